"""A program of ours with other constants, so that a test need not wait for intervals that suit real runs.

    python -m tests.patched core.run.journal.FLUSH_SECONDS=0.1 -m trainer.train ARGUMENTS

Only numbers that the program reads when it needs them can be set so, not those that are defaults of its functions.
"""

import importlib
import runpy
import sys
from collections.abc import Mapping

# The journals of a run store what they have without a pause that a test would notice.
PROMPT = {"core.run.journal.FLUSH_SECONDS": 0.1}
# A request that fails is repeated at once.
NO_PAUSES = {"core.stores.retries.BACKOFF_SECONDS": 0.01, "core.stores.faults.THROTTLED_SECONDS": 0.01}


def module_of(module: str, constants: Mapping[str, float]) -> list[str]:
    """The arguments of Python that run a module with these constants."""
    patched = [f"{name}={value}" for name, value in constants.items()]
    return ["-m", "tests.patched", *patched, "-m", module] if patched else ["-m", module]


def main() -> None:
    split = sys.argv.index("-m")
    for each in sys.argv[1:split]:
        name, value = each.split("=")
        module, _, constant = name.rpartition(".")
        found = importlib.import_module(module)
        setattr(found, constant, type(getattr(found, constant))(float(value)))
    module, *arguments = sys.argv[split + 1 :]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
