"""What ranks tell each other once, through the process group, before a backend takes over."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import ConfigError, PeerMismatch, PeerTimeout

_MESSAGE_BYTES = 16384


def group_rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, size) in ``group``; in the default group if None; (0, 1) without torch.distributed."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ConfigError.of(
            "group", "without this process", "a buffer is built by the members of its group", "call it on those only"
        )
    return rank, dist.get_world_size(group)


def _message_device(group: dist.ProcessGroup | None) -> torch.device:
    """A device that the group's backend can carry: CPU wherever it has one."""
    found = group or dist.group.WORLD
    assert found is not None
    kinds = {device.type for device in found._device_types}
    return torch.device("cpu") if "cpu" in kinds or not kinds else torch.device(kinds.pop())


def exchange(
    group: dist.ProcessGroup | None, num_ranks: int, message: dict[str, Any], timeout_s: float, what: str
) -> list[dict[str, Any]]:
    """All-gather one small JSON-able message a rank, waiting at most ``timeout_s``.

    Raises:
        PeerTimeout: Not every rank came; ``what`` says what they were awaited for.
    """
    if num_ranks == 1:
        return [message]
    text = json.dumps(message).encode()
    if len(text) > _MESSAGE_BYTES - 8:
        raise ConfigError.of(
            f"the start-up message at {what}",
            f"{len(text)} bytes",
            f"at most {_MESSAGE_BYTES - 8} are exchanged",
            "shorten EpConfig.expert_to_rank",
        )
    device = _message_device(group)
    mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    mine[:8] = torch.tensor([len(text)], dtype=torch.int64).view(torch.uint8)
    mine[8 : 8 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    mine = mine.to(device)
    theirs = [torch.empty_like(mine) for _ in range(num_ranks)]
    try:
        work = dist.all_gather(theirs, mine, group=group, async_op=True)
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise PeerTimeout(
            f"rank {dist.get_rank(group)} waited {timeout_s:g} s for {num_ranks - 1} peers at {what}: {error}"
        ) from error
    messages = []
    for received in theirs:
        raw = received.cpu().numpy().tobytes()
        messages.append(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))
    return messages


def check_agreement(fields_by_rank: list[dict[str, str]]) -> None:
    """Raise PeerMismatch, naming the settings and ranks, unless all ranks sent equal settings."""
    reference = fields_by_rank[0]
    differences = []
    for name in sorted(set().union(*fields_by_rank)):
        odd = [f"rank {r}: {f.get(name)}" for r, f in enumerate(fields_by_rank) if f.get(name) != reference.get(name)]
        if odd:
            differences.append(f"{name} (rank 0: {reference.get(name)}; {'; '.join(odd)})")
    if differences:
        raise PeerMismatch(
            f"ranks disagree on the configuration: {', '.join(differences)}; give every rank the same EpConfig"
        )
