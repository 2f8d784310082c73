"""Writes the generated tables of the documents: measurements and plans in README.md, phases in docs/formats.md.

python -m bench.tables

Measurements come from the newest record of each kind in bench/results, plans from the price snapshot in the project.
tests/test_docs.py fails for an outdated table.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import harness
from bench.harness import REPOSITORY
from core.figures import quantity
from core.run import phases

SUMS = (5, 20, 60, 100)  # dollars
RESULTS = REPOSITORY / "bench" / "results"

Row = tuple[str, str, str, float]  # the quantity, our figure, the figure and the name of the other side, the ratio


def main() -> None:
    for path, text in up_to_date().items():
        path.write_text(text)


def up_to_date() -> dict[Path, str]:
    """The texts of the documents with up-to-date tables, by file."""
    readme, formats = REPOSITORY / "README.md", REPOSITORY / "docs" / "formats.md"
    return {
        readme: _between("plans", plans(), _between("measured", table(), readme.read_text())),
        formats: _between("phases", phases.markdown(), formats.read_text()),
    }


def _between(name: str, content: str, text: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.S)


def plans() -> str:
    """The best plan for some sums, at the prices of the snapshot."""
    lines = ["| sum | model | tokens | machine | hours | expected loss |", "|---|---|---|---|---|---|"]
    for usd in SUMS:
        # This runs in a separate process with a clean environment, because the variable of a bucket's endpoint would
        # change the price of storage.
        command = [sys.executable, "cost_report.py", "plan", f"--usd={usd}", "--offline", "--json"]
        done = subprocess.run(command, cwd=REPOSITORY, env={"PATH": os.defpath}, stdout=subprocess.PIPE, check=True)
        best = json.loads(done.stdout)["plans"][0]
        lines.append(
            f"| ${usd} | {best['size']}, `{best['recipe']}` | {quantity(best['tokens'])} | {best['machine']['name']} "
            f"| {best['hours']:.1f} | {best['loss']:.2f} ± {best['loss_error']:g} |"
        )
    return "\n".join(lines)


def table() -> str:
    lines = ["| measured | ours | other | times as good | record |", "|---|---|---|---|---|"]
    for kind, rows_of in _KINDS.items():
        for path in sorted(RESULTS.glob(f"*-{kind}.json"))[-1:]:
            record = f"[{path.stem}](bench/results/{path.name})"
            for what, ours, other, times in rows_of(json.loads(path.read_text())):
                lines.append(f"| {what} | {ours} | {other} | {times:.3g} | {record} |")
    return "\n".join(lines)


def _prep(record: Mapping[str, Any]) -> list[Row]:
    speed = {
        side: record["tokens"] / statistics.median(run["seconds"] for run in runs)
        for side, runs in record["runs"].items()
    }
    what = f"{record['text']} to token shards, {record['where']} to {record['where']}"
    ours, other = speed["ours"], speed["fineweb"]
    return [(what, f"{quantity(ours)} tokens/s", f"{quantity(other)} (the usual script)", ours / other)]


def _loader(record: Mapping[str, Any]) -> list[Row]:
    median = record["median"]
    ours = median["ours"]
    rows: list[Row] = []
    for name, side in (("streaming", "mosaicml-streaming"), ("litdata", "litdata")):
        if name in median:
            mine, theirs = ours["pass_2"], median[name]["pass_2"]
            rows.append(
                (
                    "random windows from cached shards",
                    f"{quantity(mine)} tokens/s",
                    f"{quantity(theirs)} ({side})",
                    mine / theirs,
                )
            )
            mine, theirs = ours["first_batch"], median[name]["first_batch"]
            rows.append(("first batch from S3", f"{mine:.2f} s", f"{theirs:.2f} s ({side})", theirs / mine))
    return rows


def _checkpoint(record: Mapping[str, Any]) -> list[Row]:
    mine, theirs = (record["median"][side]["blocked"] for side in ("ours, S3", "torch.save, local"))
    what = f"training blocked by a checkpoint of {record['bytes'] / 1e9:.1f} GB"
    return [(what, f"{mine:.2f} s (to S3)", f"{theirs:.2f} s (torch.save, local disk)", theirs / mine)]


def _train_step(record: Mapping[str, Any]) -> list[Row]:
    runs, key = record["runs"], "tokens_per_second"
    speed = {side: statistics.median(run[key] for run in results) for side, results in runs.items()}
    mine = quantity(speed["ours"])
    what = f"training step, {quantity(record['parameters'])} parameters, {record['device']}"
    return [
        (what, f"{mine} tokens/s", f"{quantity(theirs)} ({side})", harness.ratio(runs, "ours", side, key))
        for side, theirs in speed.items()
        # `before` is left out, because the table compares with other trainers and not with an earlier version.
        if side not in ("ours", "before")
    ]


def _gpu_speed(record: Mapping[str, Any]) -> list[Row]:
    """Rows that compare the steps of other trainers with ours at the same micro-batch size.

    The names in the record have the form SIDE-SEQUENCES.
    """
    steps = {name: each["results"][0] for name, each in record["measurements"].items() if each["results"]}
    rows: list[Row] = []
    for name, other in steps.items():
        side, _, sequences = name.rpartition("-")
        ours = steps.get(f"ours-{sequences}")
        if side not in ("plain-compiled", "nanoGPT") or not ours:
            continue
        mine, theirs = ours["tokens_per_second"], other["tokens_per_second"]
        what = f"training step, gpt2-124m, {ours['device']}, {sequences} sequences"
        mfu = "" if ours["mfu"] is None else f", MFU {100 * ours['mfu']:.1f} %"
        rows.append((what, f"{quantity(mine)} tokens/s{mfu}", f"{quantity(theirs)} ({side})", mine / theirs))
    return rows


_KINDS: dict[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "prep-folder": _prep,
    "prep": _prep,
    "prep-code-folder": _prep,
    "prep-code": _prep,
    "loader": _loader,
    "checkpoint": _checkpoint,
    "train-step": _train_step,
    "gpu-speed": _gpu_speed,
}


if __name__ == "__main__":
    main()
