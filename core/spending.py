"""What the earlier segments of a run have cost, read cheaply: two objects per segment.

spent = spent_before("s3://bucket/run", segment=3)
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor

from core import journal, ledger, storage


def spent_before(run_url: str, segment: int | None = None) -> float | None:
    """Dollars of all segments, or of those with a lower number; None when the price or the time of one cannot be told.

    A machine that was killed is counted to its last heartbeat and one heartbeat interval more, which it may have lived:
    a cap must hold after many of them. Raises StorageError.
    """
    numbers = [number for number in ledger.segment_numbers(run_url) if segment is None or number < segment]
    with ThreadPoolExecutor(16) as pool:
        amounts = list(pool.map(lambda number: _spent_by(run_url, number), numbers))
    return None if None in amounts else math.fsum(amounts)


def _spent_by(run_url: str, number: int) -> float | None:
    folder = storage.join(run_url, ledger.FOLDER, ledger.segment_name(number))
    try:
        start = json.loads(storage.read_bytes(storage.join(folder, "start.jsonl")))
        price, began = start["machine"]["usd_per_hour"], start["time"]
        if start["version"] > ledger.VERSION or not 0 < price < math.inf:
            return None
        return max(0.0, _ended_at(folder, began) - began) / 3600 * price
    except (ValueError, KeyError, TypeError):
        return None


def _ended_at(folder: str, began: float) -> float:
    """When it said that it ended, else the latest that it may have lived: the end of its newest span, which is in the
    newest object unless that holds none or cannot be read, and the interval until the next one."""
    newest = sorted(storage.list_objects(storage.join(folder, "events")), key=lambda info: info.name, reverse=True)
    for info in newest:
        events, _ = journal.read_objects([info.uri])
        ends = [event["end"] for event in events if event.get("event") == "span"]
        if ends:
            closed = any(event.get("event") == "end" for event in events)
            return max(ends) + (0.0 if closed else journal.FLUSH_SECONDS)
    return began + journal.FLUSH_SECONDS
