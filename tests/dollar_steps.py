"""trainer.train, whose ledger's clock stands still but for a second per optimizer step, so that money is exact.

python -m tests.dollar_steps ARGUMENTS      as for trainer.train; USD_PER_HOUR=3600 makes each step cost a dollar

With DIE_AT_STEP in its environment, the process kills itself when that step is done.
"""

import os
import runpy
import signal
import time
from types import SimpleNamespace

from core.run import ledger, segment

if __name__ == "__main__":
    began, done = time.time(), {"steps": 0}
    clock = SimpleNamespace(time=lambda: began + done["steps"], monotonic=lambda: float(done["steps"]))
    ledger.time = clock
    segment.process_started_at = clock.time
    step_done = ledger.Ledger.step_done

    def a_second_later(book: ledger.Ledger, step: int) -> None:
        done["steps"] += 1
        step_done(book, step)
        if str(step) == os.environ.get("DIE_AT_STEP"):
            os.kill(os.getpid(), signal.SIGKILL)

    ledger.Ledger.step_done = a_second_later
    runpy.run_module("trainer.train", run_name="__main__", alter_sys=True)
