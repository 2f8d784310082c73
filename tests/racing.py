"""Two writers race for the same object, many times: who was told that it has won, and what is stored.

racing.by_processes("s3://bucket/race", 100)      100 times 0 or 1
"""

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable

from core import storage
from core.errors import ObjectExists
from tests.patience import PATIENCE_SECONDS


def by_processes(base: str, rounds: int, hard_links: bool = True) -> list[int]:
    """The winner of each round. Fails unless there is exactly one, and its content is what is stored."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    racers = [
        context.Process(target=_process, args=(base, rounds, number, hard_links, barrier, answers)) for number in (0, 1)
    ]
    for each in racers:
        each.start()
    won = dict(answers.get(timeout=PATIENCE_SECONDS) for _ in racers)
    for each in racers:
        each.join()
    return _winners(base, won)


def by_threads(base: str, rounds: int) -> list[int]:
    barrier = threading.Barrier(2)
    won: dict[int, list[int]] = {}
    racers = [
        threading.Thread(target=lambda number=number: won.update({number: _race(base, rounds, number, barrier.wait)}))
        for number in (0, 1)
    ]
    for each in racers:
        each.start()
    for each in racers:
        each.join()
    return _winners(base, won)


def _process(base: str, rounds: int, number: int, hard_links: bool, barrier, answers) -> None:
    if not hard_links:
        os.link = _no_links
    answers.put((number, _race(base, rounds, number, barrier.wait)))


def _no_links(source: str, target: str) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def _race(base: str, rounds: int, number: int, wait: Callable[[float], object]) -> list[int]:
    """The rounds that this racer was told it has won."""
    won = []
    for each in range(rounds):
        wait(PATIENCE_SECONDS)
        try:
            storage.write_bytes(storage.join(base, f"{each:04d}"), b"%d" % number, exclusive=True)
        except ObjectExists:
            continue
        won.append(each)
    return won


def _winners(base: str, won: dict[int, list[int]]) -> list[int]:
    stored = [int(storage.read_bytes(info.uri)) for info in storage.list_objects(base)]
    for each, winner in enumerate(stored):
        assert [number for number in (0, 1) if each in won[number]] == [winner], f"round {each}"
    return stored
