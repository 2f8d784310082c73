"""Starts the fork server, a clean process from which workers are forked.

The server imports the workers' modules while this program starts. This module imports the standard library only, so
that a program can call `start` before its slow imports.
"""

import multiprocessing
import multiprocessing.forkserver
import os


def start() -> None:
    """Starts the fork server unless it already runs, without waiting for it.

    The server exits when this process exits.
    """
    # Preparation multiplies no matrices, so more threads of OpenBLAS would only waste time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["data_prep.preload"])
    multiprocessing.forkserver.ensure_running()
