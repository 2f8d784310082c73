"""What torch.compile did in this process: graphs, breaks, and what was compiled again and why."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import utils

KEPT = ("stats", "aot_autograd", "inductor", "graph_break", "ddp")


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """As the trainer does on a GPU. A CPU rehearses it: the same graphs, run without a compiler behind them."""
    if device.type == "cuda":
        model.compile_blocks()
        return
    for block in model.h:
        block.compile(backend="aot_eager", fullgraph=True)


def compilations() -> int:
    """How many frames were compiled until now."""
    return len(_metrics())


def counts(since: int = 0) -> dict[str, Any]:
    """Graphs and breaks of this process; `again` are compilations of a frame that had been compiled before, `late`
    those that came after the first `since` ones."""
    found = _metrics()
    compiled = [(_name(each), each.recompile_reason) for each in found]
    again = [{"frame": name, "why": why} for name, why in compiled if why]
    counters = {kind: dict(values) for kind, values in utils.counters.items() if kind in KEPT and values}
    return {
        "compilations": len(found),
        "again": again,
        "late": [name for name, _ in compiled[since:]],
        "graph_breaks": sum(utils.counters["graph_break"].values()),
        "graphs": utils.counters["aot_autograd"].get("total", 0),
        "counters": counters,
        "optimize_ddp": str(dynamo_config.optimize_ddp),
    }


def described(found: dict[str, Any]) -> str:
    text = (
        f"{found['compilations']} compilations, {len(found['again'])} of them again, {len(found['late'])} after the "
        f"second step; {found['graphs']} graphs, {found['graph_breaks']} graph breaks, optimize_ddp "
        f"{found['optimize_ddp']}"
    )
    return "\n".join([text, *(f"again: {each['frame']}: {' '.join(each['why'].split())}" for each in found["again"])])


def _name(metrics) -> str:
    place = f"{Path(metrics.co_filename or '?').name}:{metrics.co_firstlineno}"
    return f"{metrics.co_name} ({place}) {metrics.compile_id}"


def _metrics() -> list:
    """Forward passes alone: the compilation of a backward pass has no frame of its own."""
    return [
        each
        for each in utils.get_compilation_metrics()
        if each.co_name and getattr(each, "is_forward", None) is not False
    ]
