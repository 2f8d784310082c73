"""Declares the settings of a run's folder, bounds and origin."""

from dataclasses import dataclass
from typing import Any

from core import urls
from core.settings.loader import Bounded, require, setting

# In eight launches on emulated AWS and Lambda, 79 to 133 s passed between the end of the program and the end of its
# machine. The default adds a fifth to the longest of these times.
SHUTDOWN_SECONDS = 160.0


def shutdown_reserve(identity: bool = False) -> Any:
    """The field `shutdown_reserve_seconds` of every program that has a cap."""
    help_text = "seconds from the end of this program to the end of the machine; the cap reserves the money for them"
    return setting(SHUTDOWN_SECONDS, help_text, identity=identity, ge=0)


@dataclass(frozen=True)
class RunConfig(Bounded):
    """The run and its folder."""

    url: str = setting(
        "",
        "folder for checkpoints, metrics and ledger (local, s3://, gs://, az://)",
        env="RUN_URL",
        identity=False,
        check=urls.mistake,
    )
    max_usd: float = setting(
        0.0,
        "hard cap in dollars for all segments together: the run saves and stops before it is reached; 0: no cap",
        env="MAX_USD",
        identity=False,
        ge=0,
    )
    usual_max_usd: float = setting(
        0.0,
        "cap of a launch if MAX_USD is not given and the task's cap is lower; it is above this config's forecast",
        identity=False,
        ge=0,
    )
    max_hours: float = setting(
        0.0,
        "limit of the paid hours of all machines of the run together; time spent waiting for a machine does not "
        "count; 0: no limit",
        env="MAX_HOURS",
        identity=False,
        ge=0,
    )
    max_restart_usd: float = setting(
        0.0,
        "limit in dollars for machines that start after the newest checkpoint was stored, so that a run that "
        "only restarts ends; 0: no limit",
        env="MAX_RESTART_USD",
        identity=False,
        ge=0,
    )
    branch_from: str = setting(
        "",
        "RUN@STEP, RUN@trunk or RUN: a new run begins with the weights, optimizer state and data position of "
        "that checkpoint; trunk is the last step before the cooldown; --from for short",
        identity=False,
        check=urls.mistake,
    )
    shutdown_reserve_seconds: float = shutdown_reserve()

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.url), "url", "is empty; set it with --run.url=... or with RUN_URL")
