from __future__ import annotations

import sys

from .programs import EXAMPLES, run, torchrun_command


def test_two_ranks_get_their_tokens_back() -> None:
    done = run(torchrun_command(2, "dispatch_combine.py"))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2" in done.stdout
    assert done.stdout.count("results agree") == 2


def test_plain_python_is_one_rank() -> None:
    done = run([sys.executable, str(EXAMPLES / "dispatch_combine.py"), "collective"])
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1 (collective)" in done.stdout
