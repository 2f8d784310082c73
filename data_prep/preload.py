"""Imports the workers' modules in the process from which workers are forked (data_prep/starter.py).

No other module imports this module. The garbage collector is off during the imports, and later it ignores the imported
objects. Otherwise the collector would spend a tenth of a worker's time on these objects.
"""

import contextlib
import gc

gc.disable()

import tiktoken  # noqa: E402, F401

import core.stores.remote  # noqa: E402, F401
import data_prep.workers  # noqa: E402, F401

with contextlib.suppress(ImportError):  # the worker reports it
    import gigatoken.gigatoken_rs  # noqa: F401

gc.freeze()
gc.enable()
