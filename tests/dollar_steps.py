"""trainer.train on the clock of bench.step_clock, so that money is exact.

python -m tests.dollar_steps ARGUMENTS      as for trainer.train; USD_PER_HOUR=3600 makes each step cost a dollar

With DIE_AT_STEP in its environment, the process kills itself when that step is done.
"""

import os
import runpy
import signal

from bench.step_clock import use_step_clock


def die(step: int) -> None:
    if str(step) == os.environ.get("DIE_AT_STEP"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    use_step_clock(die)
    runpy.run_module("trainer.train", run_name="__main__", alter_sys=True)
