"""trainer.serve ends: at its cap, when it is not used, and when it is asked to stop."""

import asyncio
import math

import pytest

from core.exit_codes import CAPPED
from core.run.segment import SegmentLog
from core.settings.inference import ServeConfig
from trainer import serve


class Used:
    """A server that was last used some seconds ago."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def idle_seconds(self) -> float:
        return self.seconds


class Spent:
    """A cap that is reached now, or never."""

    def __init__(self, at: float):
        self.at = at

    def latest(self, seconds: float) -> float:
        return self.at

    def describe(self) -> str:
        return "at most $4.99 of $5 spent"


@pytest.mark.parametrize(
    ("idle", "cap_at", "minutes", "code", "why"),
    [
        (0.0, 0.0, 0.0, CAPPED, "at most $4.99 of $5 spent; to continue, set a larger max_usd"),
        (61.0, math.inf, 1.0, 0, "1 minutes without a request"),
    ],
)
def test_a_server_ends_at_its_cap_and_when_it_is_not_used(monkeypatch, idle, cap_at, minutes, code, why):
    monkeypatch.setattr(serve, "LOOK_SECONDS", 0.01)
    segment = SegmentLog(cap=Spent(cap_at))
    settings = ServeConfig(idle_minutes=minutes)

    async def end() -> tuple[int, str]:
        return await serve._end(asyncio.Event(), Used(idle), settings, segment)

    assert asyncio.run(end()) == (code, why)


def test_a_server_in_use_and_below_its_cap_goes_on_until_it_is_asked_to_stop(monkeypatch):
    monkeypatch.setattr(serve, "LOOK_SECONDS", 0.01)

    async def end() -> tuple[int, str]:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, stop.set)
        return await serve._end(stop, Used(59.0), ServeConfig(idle_minutes=1), SegmentLog(cap=Spent(math.inf)))

    assert asyncio.run(end()) == (0, "asked to")
