"""What a worker needs, imported once in the process that workers are forked from (`data_prep/starter.py`).

Nothing else imports this module. The collector sleeps meanwhile, and what is here it never looks at again: the
modules stay, and going through them took a tenth of a worker's time.
"""

import contextlib
import gc

gc.disable()

import tiktoken  # noqa: E402, F401

import core.stores.remote  # noqa: E402, F401
import data_prep.workers  # noqa: E402, F401

with contextlib.suppress(ImportError):  # the worker says so
    import gigatoken.gigatoken_rs  # noqa: F401

gc.freeze()
gc.enable()
