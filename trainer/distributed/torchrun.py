"""torchrun, but when a worker fails, its own last words stay the last words.

    python -m trainer.distributed.torchrun --nproc-per-node=8 -m trainer.train CONFIG

torchrun ends such a run with a traceback of itself, which buries the sentence that says what went wrong. It ends with
the launcher that started it, and its workers end with it (PARENT_PID, core.stop). SIGTERM before it has workers ends
it; later it passes SIGTERM on to them, and the exit code is 143.
"""

from core import stop

if __name__ == "__main__":
    stop.follow_parent()  # before torch's import, which takes seconds

import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    os.environ["PARENT_PID"] = str(os.getpid())
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"rank {rank} ended first, with {failure.exitcode}; why stands above")
    except SignalException as error:
        sys.exit(128 + error.sigval)
