"""Writes all metrics of runs to one tidy table: a row per record, a column per quantity.

    python -m trainer.metrics RUN_URL [RUN_URL ...] --csv|--json|--parquet [--out=FILE]

Reads metrics and ledger of each run (core.run.measured). The columns run, kind (train, eval, hellaswag, sample, norms)
and step identify a record. machine_seconds and usd are the totals of the run up to the record, and time is Unix time.
The other columns are the fields of the records (docs/formats.md, Metrics). A step that a restart repeated has one row.
A value that is missing or not known is empty in CSV, and null in JSON and parquet. --json writes a list of objects.
Without --out the table goes to standard output. Parquet needs pyarrow (the extra `prep`; `make setup` installs it).
"""

import csv
import io
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import files, output, urls
from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from core.exit_codes import OK
from core.run import measured

log = logging.getLogger("metrics")
FORMS = ("--csv", "--json", "--parquet")
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Options of the command line. `form` is one of FORMS. If `path` is None, the table goes to standard output."""

    runs: tuple[str, ...]
    form: str
    path: Path | None


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return OK
    set_up_logging()
    options = parse(arguments)
    if options.form == "--parquet" and not options.path and sys.stdout.isatty():
        raise ConfigError("parquet is not text; name a file for it, as --out=metrics.parquet")
    runs = measured.read_all(options.runs)
    for _, run in runs:
        for problem in run.problems:
            log.warning("%s", problem)
    data = _WRITE[options.form](measured.rows(runs))
    if options.path:
        with files.replacing(options.path) as file:
            file.write(data)
        print(options.path)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
    return OK


def parse(arguments: Sequence[str]) -> Options:
    """Parses the command line. Raises ConfigError for an unknown flag, no run, or no form."""
    runs = [argument for argument in arguments if not argument.startswith("--")]
    flags = [argument for argument in arguments if argument.startswith("--")]
    forms = [form for form in FORMS if form in flags]
    places = [flag.removeprefix("--out=") for flag in flags if flag.startswith("--out=")]
    for flag in flags:
        if flag not in FORMS and not flag.startswith("--out="):
            raise ConfigError(f"{flag}: unknown flag; known ones: --csv, --json, --parquet, --out=FILE")
    if not runs:
        raise ConfigError("no run named; give the run.url of one or more runs")
    if len(forms) != 1 or len(places) > 1:
        raise ConfigError("give one of --csv, --json and --parquet, and --out=FILE at most once")
    return Options(tuple(runs), forms[0], urls.local_path(places[0], "--out") if places else None)


def as_csv(rows: Rows) -> bytes:
    """CSV with a header line, without terminal control codes and without formulas that a spreadsheet would run."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else list(measured.LEADING), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _harmless(value) if isinstance(value, str) else value for key, value in row.items()})
    return out.getvalue().encode()


def _harmless(text: str) -> str:
    return output.visible(f"'{text}" if text.startswith(output.FORMULA) else text)


def as_json(rows: Rows) -> bytes:
    """A list of objects, one per line."""
    return f"[{','.join(f'{chr(10)}{json.dumps(row)}' for row in rows)}\n]\n".encode()


def as_parquet(rows: Rows) -> bytes:
    """One parquet table. A column that mixes texts and numbers becomes text.

    No program of this project writes such a column.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("--parquet needs pyarrow; run `pip install pyarrow`, or choose --csv or --json") from None
    columns = {name: _column([row[name] for row in rows], pa) for name in (rows[0] if rows else measured.LEADING)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _column(values: list[Any], pa: Any) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        pass
    if all(value is None or type(value) in (int, float) for value in values):
        return pa.array([None if value is None else float(value) for value in values])
    return pa.array([None if value is None else str(value) for value in values])


_WRITE = dict(zip(FORMS, (as_csv, as_json, as_parquet), strict=True))


if __name__ == "__main__":
    run_entry(main, shows=True)
