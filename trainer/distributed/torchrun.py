"""Runs torchrun without the traceback of torchrun, which would hide the error of a failed worker.

    python -m trainer.distributed.torchrun --nproc-per-node=8 -m trainer.train CONFIG

After a failure, plain torchrun prints this traceback below the worker's error. This process ends when the launcher that
started it ends, and the workers end when this process ends (PARENT_PID, core.stop). On SIGTERM, this process forwards
the signal to its workers and exits with 143. If it has no workers yet, it just ends.
"""

from core import stop

if __name__ == "__main__":
    stop.follow_parent()  # called before the import of torch, which takes seconds

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
        sys.exit(f"rank {rank} ended first, with {failure.exitcode}; its error is above")
    except SignalException as error:
        sys.exit(128 + error.sigval)
