"""Which rank holds which expert, as data.

Nothing else in the package divides expert ids by anything: every question about placement is answered
here, so an arbitrary map costs no more than the default one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ConfigError


def contiguous_expert_to_rank(num_experts: int, num_ranks: int) -> tuple[int, ...]:
    """Spread experts over ranks in order, the first ``num_experts % num_ranks`` ranks holding one more.

    Equals the usual equal split where the division is even; fewer experts than ranks leave ranks with
    none.
    """
    base, extra = divmod(num_experts, num_ranks)
    sizes = [base + (rank < extra) for rank in range(num_ranks)]
    return tuple(rank for rank, size in enumerate(sizes) for _ in range(size))


@dataclass(frozen=True)
class ExpertPlacement:
    """Expert to (rank, local index), where local experts are numbered by ascending expert id.

    Attributes:
        num_ranks: Ranks in the group.
        expert_to_rank: The rank of every expert.
        local_index: Every expert's index among those of its rank.
        experts_of_rank: Expert ids of every rank, ascending.
    """

    num_ranks: int
    expert_to_rank: tuple[int, ...]
    local_index: tuple[int, ...] = field(init=False)
    experts_of_rank: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        held: list[list[int]] = [[] for _ in range(self.num_ranks)]
        local = []
        for expert, rank in enumerate(self.expert_to_rank):
            if not 0 <= rank < self.num_ranks:
                raise ConfigError.of(
                    f"expert_to_rank[{expert}]",
                    rank,
                    f"the group has ranks 0 to {self.num_ranks - 1}",
                    "map every expert to a rank of the group",
                )
            local.append(len(held[rank]))
            held[rank].append(expert)
        object.__setattr__(self, "local_index", tuple(local))
        object.__setattr__(self, "experts_of_rank", tuple(tuple(h) for h in held))

    @classmethod
    def make(cls, num_experts: int, num_ranks: int, expert_to_rank: tuple[int, ...] | None) -> ExpertPlacement:
        """Placement from a map, or the contiguous one where the map is None."""
        return cls(num_ranks, expert_to_rank or contiguous_expert_to_rank(num_experts, num_ranks))
