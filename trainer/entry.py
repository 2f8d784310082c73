"""What the entries that train have in common: settings first, torch only when they hold."""

import functools
import os
from collections.abc import Callable

from core.console import set_up_logging
from core.exit_codes import OK
from core.settings import loader
from trainer.checkpoint import early


def train(arguments: list[str], schema: type, usage: str, stage: Callable[[], Callable]) -> int:
    """Load `schema` from the arguments and train; `stage` imports the class of the stage, which takes torch.

    Returns the exit code. Raises LauncherError.
    """
    set_up_logging(speaks=os.environ.get("RANK", "0") == "0")
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(schema, usage))
        return OK
    settings = loader.load(schema, arguments, os.environ)
    # torch takes seconds to import: a wrong setting should not have to wait for it, and a checkpoint arrives meanwhile.
    fetched = early.start(settings.run.url, os.environ)
    from trainer.loop.segment import run_stage

    return run_stage(functools.partial(stage(), settings), settings, fetched)
