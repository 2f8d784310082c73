"""A cloud whose machines are a list, and what SkyPilot 0.14.1 prints, for tests of `make down`, `logs` and `watch`."""

import json

from clouds.base import Cloud, Inventory, Leftover, Ownership
from clouds.providers import CLOUDS
from launch import down

BROUGHT_UP = (
    "\x1b[2mFailed to connect to SkyPilot API server at http://127.0.0.1:46580. Starting a local server.\x1b[0m\n"
    "\x1b[32m✓ SkyPilot API server started.\x1b[0m [INFO] ready\n"
)
NO_CONTROLLER = ("", "sky.exceptions.ClusterNotUpError: No in-progress managed jobs.\n", 1)


USER = "1a2b3c4d"
LABELS = {"project": "pretrain-launcher"}
SPOT_JOB = "pretrain-8xa100-spot"


def cluster(name: str, **more) -> dict:
    on_cloud = f"{name}-{USER}"
    record = {"name": name, "status": "UP", "is_managed": False, "labels": None, "cluster_name_on_cloud": on_cloud}
    return record | {"cluster_hash": f"hash-{name}", **more}


def job(number: int, status: str = "RUNNING", name: str = SPOT_JOB) -> dict:
    return {"job_id": number, "job_name": name, "status": status}


def said(*records: dict) -> tuple[str, str, int]:
    return json.dumps(records), "", 0


class Pretended(Cloud):
    """A cloud with `machines`; one that is ended is gone."""

    def __init__(self):
        self.machines: list[Leftover] = []
        self.unasked: tuple[str, ...] = ()
        self.ended: list[str] = []

    def is_configured(self) -> bool:
        return True

    def leftovers(self, whose: Ownership) -> Inventory:
        return Inventory(tuple(self.machines), self.unasked)

    def has(self, what: str, **more) -> None:
        def end() -> None:
            self.ended.append(what)
            self.machines = [each for each in self.machines if each.what != what]

        self.machines.append(Leftover(what, end=end, **more))


def only_cloud(sky, monkeypatch) -> Pretended:
    """Pretend that this is the only cloud of the user. `down.main` runs in this process, with YES=1, without pauses."""
    sky.find_here(monkeypatch)
    (sky.home / ".sky").mkdir()
    (sky.home / ".sky/user_hash").write_text(USER)
    monkeypatch.setenv("YES", "1")
    monkeypatch.delenv("ALL", raising=False)
    monkeypatch.setattr(down, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(down.environment, "adopt", lambda: None)
    pretended = Pretended()
    for name in list(CLOUDS):
        monkeypatch.delitem(CLOUDS, name)
    monkeypatch.setitem(CLOUDS, "pretended", pretended)
    sky(**{"jobs queue": NO_CONTROLLER, "status": said()})
    return pretended


def downs(sky) -> list[str]:
    return [call for call in sky.called() if call.startswith("down")]
