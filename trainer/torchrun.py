"""torchrun, but when a worker fails, its own last words stay the last words.

    python -m trainer.torchrun --nproc-per-node=8 -m trainer.train CONFIG

torchrun ends such a run with a traceback of itself, which buries the sentence that says what went wrong.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"rank {rank} ended first, with {failure.exitcode}; why stands above")
