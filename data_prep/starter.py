"""The clean process that workers are forked from. It imports what they need while the parent still makes the plan.

Only the standard library is imported here, so that an entry can start it before its own imports.
"""

import multiprocessing
import multiprocessing.forkserver
import os


def start() -> None:
    """Start it unless it runs; returns at once. It ends with this process."""
    # Nothing here multiplies matrices: OpenBLAS's threads only spin for a while.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["data_prep.preload"])
    multiprocessing.forkserver.ensure_running()
