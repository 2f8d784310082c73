"""The ledger of a preparation: where this node's time goes, for the cost report. Kept if RUN_URL is set.

Every node books a segment of its own, at its share of the price of all nodes, because each starts and ends by itself.
The phases: `init` (imports, the plan), `prep` (documents to shards) and `finalize`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from core import ledger, run, stop
from core.schema_prep import PrepConfig

Switch = Callable[[str], None]


@contextlib.contextmanager
def opened(config: PrepConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Switch]:
    """Gives the function that says which phase begins. How the block is left is how the segment ended."""
    run_url = environment.get("RUN_URL")
    if not run_url:
        yield lambda phase: None
        return
    together = run.machine_from_environment(None, 0, environment)
    price = together.usd_per_hour
    machine = replace(together, nodes=1, usd_per_hour=price and price / together.nodes)
    program = run.program_versions(("numpy", "pyarrow", "gigatoken", "tiktoken")) | {
        "stage": "prep",
        "command": "data_prep.prepare",
        "node": config.node_rank,
    }
    book = ledger.Ledger(run_url, machine, program, run.segment_started_at(), run.process_started_at())
    stop.on_leaving(lambda: book.close("preempted"))
    reason = "failed"
    try:
        yield book.switch
        reason = "finished"
    except KeyboardInterrupt:
        reason = "interrupted"
        raise
    finally:
        book.close(reason)
