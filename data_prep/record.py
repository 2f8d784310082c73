"""The ledger of a preparation: where this node's time goes, for the cost report. Kept if RUN_URL is set.

Every node opens a segment of its own, at its share of the price of all nodes, because each starts and ends for itself.
The phases: `init` (imports, the plan), `prep` (documents to shards) and `finalize`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

from core import stop
from core.run.folder import RunFolder
from core.run.segment import Opening, open_segment
from core.settings.preparation import PrepConfig

Switch = Callable[[str], None]


@contextlib.contextmanager
def opened(config: PrepConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Switch]:
    """Gives the function that says which phase begins. How the block is left is how the segment ended."""
    run_url = environment.get("RUN_URL")
    if not run_url:
        yield lambda phase: None
        return
    opening = Opening(
        stage="prep",
        config={},
        packages=("numpy", "pyarrow", "gigatoken", "tiktoken"),
        program={"command": "data_prep.prepare", "node": config.node_rank},
        is_per_node=True,
    )
    with open_segment(RunFolder(run_url), opening, environment=environment) as segment:
        stop.on_leaving(lambda: segment.close("preempted"))
        yield segment.switch
