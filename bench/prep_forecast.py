"""What preparing sample-10BT takes on a rented CPU node, computed from a benchmark's results.

    python -m bench.prep_forecast bench/results/DATE-prep.json [--instance=c6i.2xlarge] [--region=us-east-1] ...

Download, computing and upload overlap, so the slowest of them decides. Every assumption is a flag and is printed.
The price is read from the catalog snapshot in costs/catalog, whose date its README gives.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

CATALOG = Path(__file__).parent.parent / "costs" / "catalog"
# The listing of the data set at revision 87f09149: 14 files.
PARQUET_BYTES = 28_518_193_415


def main() -> None:
    options = _options()
    results = json.loads(options.results.read_text())
    price, vcpus = _instance(options)
    cores = results["machine"]["cores"]
    seconds = statistics.median(run["seconds"] for run in results["runs"]["ours"])
    scale = vcpus / cores
    tokens, text = options.tokens, options.tokens * options.bytes_per_token
    steps = {
        "download": PARQUET_BYTES * 8 / (options.download_gbit * 1e9),
        "compute, by tokens": tokens / (results["tokens"] / seconds * scale),
        "compute, by bytes of text": text / (results["text_bytes"] / seconds * scale),
        "upload": 2 * tokens * 8 / (options.upload_gbit * 1e9),
    }
    slowest = max(steps, key=steps.__getitem__)
    total = steps[slowest] + 60 * options.boot_minutes
    table = Table("step", "minutes", title=f"FineWeb-Edu sample-10BT on one {options.instance} ({vcpus:.0f} vCPUs)")
    for name, needed in steps.items():
        table.add_row(f"{name}{' (decides)' if name == slowest else ''}", f"{needed / 60:.1f}")
    table.add_row("boot and set-up", f"{options.boot_minutes:.1f}")
    table.add_row("in all", f"{total / 60:.1f}", style="bold")
    table.add_row("dollars", f"{total / 3600 * price:.2f}", style="bold")
    Console().print(table)
    print("Assumptions:")
    for line in (
        f"computing: {options.results.name}, median {seconds:.1f} s for {results['tokens'] / 1e6:.1f}M tokens on "
        f"{cores} cores, from {results['where']} to {results['where']} on one machine; a vCPU counts as such a core, "
        "and they add up",
        f"{tokens / 1e9:g} billion tokens of {options.bytes_per_token:g} bytes of text, "
        f"{PARQUET_BYTES / 1e9:.1f} GB of parquet",
        f"{options.download_gbit:g} Gbit/s sustained from the Hub, {options.upload_gbit:g} Gbit/s to the bucket: "
        "not measured",
        f"{price:g} dollars per hour on demand in {options.region} (costs/catalog); disks and traffic not included",
    ):
        print(f"  - {line}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of bench.prep")
    parser.add_argument("--cloud", default="aws")
    parser.add_argument("--instance", default="c6i.2xlarge")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--tokens", type=float, default=10e9)
    parser.add_argument("--bytes-per-token", type=float, default=4.7, help="of the text")
    parser.add_argument("--download-gbit", type=float, default=1.0)
    parser.add_argument("--upload-gbit", type=float, default=2.0)
    parser.add_argument("--boot-minutes", type=float, default=4.0)
    return parser.parse_args()


def _instance(options: argparse.Namespace) -> tuple[float, float]:
    """Dollars per hour on demand, and vCPUs."""
    path = CATALOG / options.cloud / "vms.csv"
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["InstanceType"], row["Region"]) == (options.instance, options.region) and row["Price"]:
                return float(row["Price"]), float(row["vCPUs"])
    raise SystemExit(
        f"{path}: no price of {options.instance} in {options.region}; name another with --instance, --region"
    )


if __name__ == "__main__":
    main()
