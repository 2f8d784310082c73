"""Measurements dealt to the ranks in turn: the same numbers in the same order on any number of ranks."""

from collections.abc import Callable, Sequence

from trainer.distributed.process_group import Ranks, gather_objects

# Called before each round of batches, on all ranks together; may raise Abandoned, then on all of them.
Between = Callable[[], None]


def in_turn(
    count: int, measure: Callable[[int], Sequence[float]], ranks: Ranks, between: Between | None = None
) -> list[list[float]]:
    """[measure(0), ..., measure(count - 1)], each computed by one rank, on all ranks."""
    mine = []
    for first in range(0, count, ranks.world):
        if between:
            between()
        if first + ranks.rank < count:
            mine.append(list(measure(first + ranks.rank)))
    everyone = gather_objects(mine, ranks)
    return [everyone[index % ranks.world][index // ranks.world] for index in range(count)]
