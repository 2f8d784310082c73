"""Books the time of a preparation or an import in the ledger of RUN_URL, for the cost report."""

import os
import time

from core import stop
from core.errors import CapReached
from core.run.folder import RunFolder
from core.run.segment import Opening, SegmentLog, open_segment


def open_log(program: str, node_rank: int = 0, max_usd: float = 0.0, shutdown_seconds: float = 0.0) -> SegmentLog:
    """The SegmentLog of this node, with a cap if `max_usd` is not 0. It writes nothing unless RUN_URL is set.

    Each node opens a segment with its share of the price, because nodes start and end independently. The phases are
    `init` (imports, the plan), `prep` (documents or tokens to shards) and `finalize`.
    """
    run_url = os.environ.get("RUN_URL")
    if not run_url:
        return SegmentLog()
    opening = Opening(
        stage="prep",
        config={},
        packages=("numpy", "pyarrow", "gigatoken", "tiktoken"),
        program={"command": program, "node": node_rank},
        max_usd=max_usd,
        shutdown_seconds=shutdown_seconds,
        is_per_node=True,
    )
    segment = open_segment(RunFolder(run_url), opening)
    stop.on_leaving(lambda: segment.close("preempted"))
    return segment


def check_cap(segment: SegmentLog, data_url: str, max_usd: float) -> None:
    """Raises CapReached if the machine must end now to stay below the cap."""
    if segment.cap and time.time() >= segment.cap.latest():
        raise CapReached(
            f"{data_url}: its preparation has cost nearly the ${max_usd:g} of max_usd; finished parts "
            "are kept: continue with a larger MAX_USD and the same command"
        )
