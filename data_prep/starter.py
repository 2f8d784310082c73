"""Starts the clean process from which workers are forked. It makes their imports while the parent plans.

Imports the standard library only, so that an entry can call `start` before slow imports.
"""

import multiprocessing
import multiprocessing.forkserver
import os


def start() -> None:
    """Starts the process unless it runs, and returns at once. It exits with this process."""
    # Preparation multiplies no matrices; further threads of OpenBLAS would only spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["data_prep.preload"])
    multiprocessing.forkserver.ensure_running()
