"""Divides the time of a machine among the segments that used it at the same time, so that no time is billed twice.

Segments are on one machine if they name the same host of the same cluster. While n segments share a machine, each
segment pays for one n-th of the time, at the segment's own price.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from core.run.model import Run, Segment, Span

Machine = tuple[str | None, ...]


@dataclass(frozen=True)
class Shares:
    """The shares of time for which a segment pays. From `edges[i]` to `edges[i + 1]`, the share is `shares[i]`."""

    edges: Sequence[float]
    shares: Sequence[float]

    def of(self, start: float, end: float) -> float:
        """The mean share over an interval."""
        if end <= start:
            return 1.0
        paid, at = end - start, max(0, bisect_right(self.edges, start) - 1)
        for low, high, share in zip(self.edges[at:], self.edges[at + 1 :], self.shares[at:], strict=False):
            if low >= end:
                break
            paid -= max(0.0, min(high, end) - max(low, start)) * (1.0 - share)
        return paid / (end - start)

    def applied(self, span: Span) -> Span:
        """A copy of the span with only the seconds for which the segment pays."""
        share = self.of(span.start, span.end)
        return replace(span, phases={phase: seconds * share for phase, seconds in span.phases.items()})


def machine_of(segment: Segment) -> Machine | None:
    """A key of the segment's machine, or None if the ledger names no host."""
    if not segment.machine.host or segment.started_at is None:
        return None
    return (segment.machine.host, segment.launcher.get("cluster"), segment.launcher.get("node_ips"))


def shares_of(run: Run, others: Iterable[Segment] = ()) -> dict[int, Shares]:
    """The shares of the segments that shared a machine, by number. `others` are segments of other runs."""
    users: dict[Machine, list[tuple[Segment, bool]]] = {}
    for mine, segments in ((True, run.segments), (False, others)):
        for segment in segments:
            if (machine := machine_of(segment)) and segment.spans:
                users.setdefault(machine, []).append((segment, mine))
    found: dict[int, Shares] = {}
    for group in users.values():
        if len(group) > 1 and _overlap([segment for segment, _ in group]):
            found |= _shares([segment for segment, _ in group], [segment for segment, mine in group if mine])
    return found


def _overlap(segments: list[Segment]) -> bool:
    reached = float("-inf")
    for segment in sorted(segments, key=_start):
        if _start(segment) < reached:
            return True
        reached = max(reached, segment.ended_at)
    return False


def _shares(users: list[Segment], mine: list[Segment]) -> dict[int, Shares]:
    edges = sorted({edge for each in users for edge in (_start(each), each.ended_at)})
    change = dict.fromkeys(edges, 0)
    for each in users:
        change[_start(each)] += 1
        change[each.ended_at] -= 1
    counts, count = [], 0
    for edge in edges[:-1]:
        count += change[edge]
        counts.append(max(1, count))
    found = {}
    for each in mine:
        first, last = bisect_left(edges, _start(each)), bisect_left(edges, each.ended_at)
        own = counts[first:last]
        if any(count > 1 for count in own):
            found[each.number] = Shares(edges[first : last + 1], [1 / count for count in own])
    return found


def _start(segment: Segment) -> float:
    return segment.spans[0].start
