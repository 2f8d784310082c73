"""Is one GPU slower than the others? A throttling or damaged one holds up all, and everybody pays for it.

Ranks wait for each other within a step, so what counts is the time of the forward passes, in which nobody waits.
"""

import statistics

SLOWER_BY = 1.25  # times the median of all ranks
IN_A_ROW = 3  # looks; a single slow one may be anything


class SlowPeers:
    """Fed with the forward seconds of every rank; names a rank that stays slow, once."""

    def __init__(self, world: int):
        self._slow_looks = [0] * world

    def look(self, seconds: list[float]) -> list[tuple[int, float]]:
        """(rank, how many times the median) of ranks that have just been slow for the third look in a row."""
        median = statistics.median(seconds)
        found = []
        for rank, mine in enumerate(seconds):
            slow = median > 0 and mine > SLOWER_BY * median
            self._slow_looks[rank] = self._slow_looks[rank] + 1 if slow else 0
            if self._slow_looks[rank] == IN_A_ROW:
                found.append((rank, mine / median))
        return found
