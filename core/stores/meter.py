"""Counts the bytes and requests that this process exchanges with remote stores. The ledger keeps the counts.

meter.moved()      [bytes read, bytes written, requests that read, requests that write or list]
"""

import threading

from core.stores.base import Store

FIELDS = ("read_bytes", "written_bytes", "reads", "writes")
_lock = threading.Lock()
_moved = dict.fromkeys(FIELDS, 0)


def count(store: Store, **amounts: int) -> None:
    """Add to the counts named in FIELDS. A local folder is not counted, because it costs nothing."""
    if store.is_local:
        return
    with _lock:
        for name, amount in amounts.items():
            _moved[name] += amount


def moved() -> list[int]:
    """The counts since the start of the process, in the order of FIELDS."""
    with _lock:
        return list(_moved.values())
