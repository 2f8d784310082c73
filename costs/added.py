"""Stores bills from other sources with a run.

The user adds such a bill by hand, because neither the ledger nor a cloud shows it.

    python cost_report.py add RUN_URL "Hugging Face" 2.00 [--date=2026-11-30]

Each bill is an object RUN_URL/bills/NAME.json. The report shows a bill in the phase `elsewhere`, on the day of the
bill.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from core import figures, output, storage, untrusted
from core.errors import ConfigError, LauncherError, ObjectExists, RunError
from core.run import timeline
from core.run.model import Run
from core.run.reader import Detail, read_run
from costs.model import Charge

PHASE = "elsewhere"
FORMAT, VERSION = "bill", 1
LONGEST = 80  # largest number of characters in a supplier's name
USAGE = 'python cost_report.py add RUN_URL "Hugging Face" 2.00 [--date=2026-11-30]'


@dataclass(frozen=True)
class Bill:
    """A bill from another source for a run: its dollars, and its day as the unix time of noon UTC."""

    supplier: str
    usd: float
    time: float

    @property
    def name(self) -> str:
        text = f"{self.supplier}\n{self.usd!r}\n{self.time!r}"
        return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def main(arguments: Sequence[str]) -> None:
    """Store a bill. Raises ConfigError, RunError, StorageError.

    Raises RunError if a bill with the same supplier, dollars and day exists.
    """
    words = [argument for argument in arguments if not argument.startswith("--")]
    flags = [argument for argument in arguments if argument.startswith("--")]
    dates = [flag.removeprefix("--date=") for flag in flags if flag.startswith("--date=")]
    if len(words) != 3 or len(dates) != len(flags) or len(dates) > 1:
        raise ConfigError(f"give a run, a supplier and dollars: {USAGE}")
    run_url, supplier, amount = words
    bill = Bill(_supplier(supplier), _dollars(amount), _noon(dates[0]) if dates else _noon(_today()))
    run = read_run(run_url, Detail.MONEY)
    uri = storage.join(run.folder.bills, bill.name)
    document = {"format": FORMAT, "version": VERSION, "supplier": bill.supplier, "usd": bill.usd, "time": bill.time}
    try:
        storage.write_bytes(uri, (json.dumps(document) + "\n").encode(), exclusive=True)
    except ObjectExists:
        day = datetime.fromtimestamp(bill.time, UTC).date()
        raise RunError(
            f"{uri}: a bill of {bill.supplier} over ${figures.dollars(bill.usd)} of {day} already exists; "
            "if it is another bill, give its --date"
        ) from None
    print(f"{uri}: ${figures.dollars(bill.usd)}, {bill.supplier}; python cost_report.py shows it as {PHASE}")


def charges(run: Run) -> list[Charge]:
    """The bills among the objects of a run. For a bill that cannot be read, `run.problems` gets a sentence."""
    found = []
    for info in run.objects:
        if not info.uri.startswith(f"{run.folder.bills}/"):
            continue
        try:
            bill = _read(info.uri)
        except (LauncherError, ValueError, KeyError, TypeError) as error:
            run.problems.append(f"{info.uri}: left out, not a bill ({error}); delete it, and add it again")
            continue
        found.append(Charge(PHASE, bill.time, bill.time, bill.usd, f"{bill.supplier}, added by hand"))
    return found


def _read(uri: str) -> Bill:
    document = untrusted.read_object(uri)
    if (document["format"], document["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {document['format']!r} version {document['version']!r}")
    usd, day, supplier = timeline.number(document["usd"]), timeline.moment(document["time"]), document["supplier"]
    if usd is None or usd < 0 or day is None or not isinstance(supplier, str):
        raise ValueError("usd, time or supplier is of another type, or out of bounds")
    return Bill(output.visible(supplier[:LONGEST]), usd, day)


def _supplier(text: str) -> str:
    name = " ".join(text.split())
    if not name or len(name) > LONGEST or output.visible(name) != name:
        raise ConfigError(f"the supplier is {text!r}, must be a name of at most {LONGEST} characters")
    return name


def _dollars(text: str) -> float:
    try:
        usd = float(text.removeprefix("$"))
    except ValueError:
        usd = math.nan
    if not 0 < usd <= timeline.LARGEST:
        raise ConfigError(f"the dollars are {text!r}, must be a number above zero, such as 2.00")
    return usd


def _today() -> str:
    return datetime.fromtimestamp(time.time(), UTC).date().isoformat()


def _noon(text: str) -> float:
    try:
        return datetime.fromisoformat(f"{text}T12:00:00+00:00").timestamp()
    except ValueError:
        raise ConfigError(f"--date is {text!r}, must be a day such as 2026-11-30") from None
