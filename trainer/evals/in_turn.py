"""Measurements dealt to the ranks in turn: the same numbers in the same order on any number of ranks."""

from collections.abc import Callable, Sequence

from trainer.distributed import Ranks, gather_objects


def in_turn(count: int, measure: Callable[[int], Sequence[float]], ranks: Ranks) -> list[list[float]]:
    """[measure(0), ..., measure(count - 1)], each computed by one rank, on all ranks."""
    mine = [list(measure(index)) for index in range(ranks.rank, count, ranks.world)]
    everyone = gather_objects(mine, ranks)
    return [everyone[index % ranks.world][index // ranks.world] for index in range(count)]
