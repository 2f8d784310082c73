"""Books the time of a preparation or an import in the ledger of RUN_URL, for the cost report."""

import os

from core import stop
from core.run.folder import RunFolder
from core.run.segment import Opening, SegmentLog, open_segment


def open_log(program: str, node_rank: int = 0, max_usd: float = 0.0, shutdown_seconds: float = 0.0) -> SegmentLog:
    """The SegmentLog of this node, with a cap if `max_usd` is not 0. It writes nothing unless RUN_URL is set.

    Each node opens a segment at its share of the price, because nodes start and end independently. The phases are
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
