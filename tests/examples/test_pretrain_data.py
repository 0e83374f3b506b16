"""The parts of the training job that need neither torch nor ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("examples_on_path")


def write_files(directory: Path, count: int) -> None:
    for i in range(count):
        (directory / f"{i}.txt").write_text(f"text number {i}\n" * 20)


def test_split_is_by_file_and_does_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    from pretrain.data import load_corpus

    corpora = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, 60)
        corpora.append(load_corpus([str(tmp_path / name)]))
    first, second = corpora
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.train, second.train) and np.array_equal(first.held_out, second.held_out)
    assert 1 <= first.num_held_out_files <= 15
    assert first.num_train_files + first.num_held_out_files == 60
    trained_on = set(first.train.tobytes().decode().splitlines())
    assert not trained_on & set(first.held_out.tobytes().decode().splitlines())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_files_leave_text_for_both_parts(tmp_path: Path, count: int) -> None:
    from pretrain.data import load_corpus

    write_files(tmp_path, count)
    (tmp_path / "binary").write_bytes(b"\0" * 100)
    (tmp_path / "empty").touch()
    corpus = load_corpus([str(tmp_path)])
    assert len(corpus.train) and len(corpus.held_out)


def test_windows_depend_on_seed_and_step_only(tmp_path: Path) -> None:
    from pretrain.data import held_out_windows, load_corpus, training_windows

    write_files(tmp_path, 5)
    corpus = load_corpus([str(tmp_path)])

    def draw(seed: int, step: int) -> np.ndarray:
        return training_windows(corpus, seed=seed, step=step, count=4, seq_length=16)

    assert draw(1, 7).shape == (4, 17)
    assert np.array_equal(draw(1, 7), draw(1, 7))
    assert not np.array_equal(draw(1, 7), draw(1, 8)) and not np.array_equal(draw(1, 7), draw(2, 7))
    windows = held_out_windows(corpus, count=1000, seq_length=16)
    assert windows[0].tobytes() == corpus.held_out[:17].astype(np.int64).tobytes()
    assert windows[-1].tobytes() == corpus.held_out[-17:].astype(np.int64).tobytes()


def test_bigram_loss_of_known_texts() -> None:
    from pretrain.bigram import bigram_loss

    alternating = np.tile(np.array([65, 66], dtype=np.uint8), 50_000)
    windows = alternating[None, :100].astype(np.int64)
    assert bigram_loss(alternating, windows) < 1e-3
    four_sided = np.random.default_rng(0).integers(0, 4, size=200_000).astype(np.uint8)
    assert bigram_loss(four_sided, four_sided[None].astype(np.int64)) == pytest.approx(np.log(4), abs=1e-3)
    # A pair that was never seen costs much, but not infinitely much.
    assert 5 < bigram_loss(alternating, np.array([[65, 67]])) < 50
