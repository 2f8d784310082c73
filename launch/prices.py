"""Renews the price snapshot in clouds/catalog from the catalogs that SkyPilot keeps on this machine.

    python -m launch.prices             shows each price that changed, and stores the new ones
    python -m launch.prices --dry-run   shows them only

If SkyPilot's catalog lacks a row of the snapshot, the row keeps its price, and the program names the row. SkyPilot
fetches its catalogs when it launches, or with `sky check`.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from clouds import catalog, skypilot
from clouds.providers import CLOUDS
from core import files
from core.console import run_entry
from core.errors import ConfigError

KEY = ("InstanceType", "Region", "AvailabilityZone")
PRICES = ("Price", "SpotPrice")
USAGE = "usage: python -m launch.prices [--dry-run]"


def main(arguments: list[str]) -> None:
    """Print the changes, and store them unless --dry-run is given. Raises ConfigError if there is nothing to read."""
    if set(arguments) - {"--dry-run"}:
        raise ConfigError(f"{USAGE}; {' '.join(arguments)!r} is something else")
    origins = catalog.SOURCE.read_text(encoding="utf-8").splitlines()
    found = False
    for cloud in CLOUDS:
        path = skypilot.catalog_file(cloud)
        if not path.exists():
            print(f"{cloud}: SkyPilot has no catalog here ({path}); its prices stay as they are")
            continue
        found = True
        day = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
        text, changes = renewed(_rows(catalog.FOLDER / cloud / "vms.csv"), _rows(path))
        print(f"{cloud}: catalog of {day}, {len(changes)} changed")
        for change in changes:
            print(f"  {change}")
        if "--dry-run" not in arguments:
            _store(catalog.FOLDER / cloud / "vms.csv", text)
            names = [line.split()[0] for line in origins]
            origins = [
                f"{name} {day}" if name.lower() == cloud else line for name, line in zip(names, origins, strict=True)
            ]
    if not found:
        raise ConfigError("SkyPilot keeps no catalog on this machine; run `make setup-launch` and `sky check` first")
    if "--dry-run" not in arguments:
        _store(catalog.SOURCE, "".join(f"{line}\n" for line in origins))


def renewed(ours: Sequence[Mapping[str, str]], theirs: Sequence[Mapping[str, str]]) -> tuple[str, list[str]]:
    """The CSV text of `ours` with the prices of `theirs`, and a line for each price that changed or is missing."""
    prices = {tuple(row.get(name, "") for name in KEY): row for row in theirs}
    changes, rows = [], []
    for row in ours:
        key = tuple(row.get(name, "") for name in KEY)
        new = prices.get(key)
        place = " ".join(part for part in key if part)
        if new is None:
            changes.append(f"{place}: is not in SkyPilot's catalog any more; its prices stay")
            rows.append(dict(row))
            continue
        for name in PRICES:
            before, after = row.get(name, ""), new.get(name, "")
            if _number(before) != _number(after):
                changes.append(f"{place} {name}: {before or 'none'} → {after or 'none'}{_percent(before, after)}")
        rows.append({**row, **{name: new.get(name, "") for name in PRICES if name in row}})
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ours[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue(), changes


def _store(path: Path, text: str) -> None:
    with files.replacing(path) as file:
        file.write(text.encode())


def _percent(before: str, after: str) -> str:
    old, new = _number(before), _number(after)
    return f" ({100 * (new / old - 1):+.1f} %)" if old and new else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a price catalog: {error}") from None


if __name__ == "__main__":
    run_entry(main)
