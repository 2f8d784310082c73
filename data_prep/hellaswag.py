"""Stores HellaSwag beside a token set. The stored form does not depend on the copy that is read.

HellaSwag here means all 10,042 items of the validation set of Zellers et al. 2019 (MIT licence). Copies differ in the
order of fields and in the type of the label. All are converted to one form and compared with the checksum of that form,
so that scores are comparable.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from shlex import quote
from typing import Any

from core import storage
from core.data import sets
from core.data.sets import SetInfo
from core.errors import DataError, LauncherError
from data_prep.sources.rows import read_rows

log = logging.getLogger(__name__)

SOURCE = "hf://datasets/Rowan/hellaswag/data/validation-00000-of-00001.parquet"
# Checksum of the authors' own file, hellaswag_val.jsonl in github.com/rowanz/hellaswag: 12,246,618 bytes.
FILE_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
# Checksum of the Hub's rows in the stored form. The authors' file has the same size, but the order of its fields
# varies.
ROWS_SHA256 = "dc1be2fa1bef56aab8e92a5be597a617e363b09239fa66822939d7fb7a8da4ec"
FIELDS = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "split", "split_type", "label", "endings", "source_id")


def ensure(data_url: str, names: Sequence[str]) -> None:
    """Store the evaluation sets `names`, unless stored already. Raises DataError, StorageError, with the remedy."""
    for name in names:
        if storage.exists(storage.join(data_url, "sets", f"{name}.json")):
            continue
        try:
            info = store(data_url, SOURCE)
        except LauncherError as error:
            raise type(error)(
                f"{error}; start again to try once more, leave the set out with --evaluation_sets=, or store a copy: "
                f"python -m data_prep.sets {quote(name)} {quote(data_url)} --from=FILE"
            ) from error
        log.info("%s/sets/%s.jsonl: %d rows, for evaluation", data_url, name, info.rows)


def store(data_url: str, source: str) -> SetInfo:
    """Stores HellaSwag below `data_url`. Raises DataError unless `source` holds exactly the published rows."""
    found = read_rows(source)
    data = stored_form(found, source)
    digest = hashlib.sha256(data).hexdigest()
    if digest != ROWS_SHA256 and hashlib.sha256(storage.read_bytes(source)).hexdigest() != FILE_SHA256:
        raise DataError(
            f"{source}: its {len(found)} rows have the checksum {digest[:12]}…, HellaSwag's validation set has "
            f"{ROWS_SHA256[:12]}…; give the authors' hellaswag_val.jsonl or the Hub's Rowan/hellaswag"
        )
    return sets.write(data_url, "hellaswag", "hellaswag", source, "MIT", data)


def stored_form(found: list[Any], where: str) -> bytes:
    """The rows in the stored form: FIELDS in order, labels as numbers."""
    try:
        return json_lines(
            [{field: int(row[field]) if field == "label" else row[field] for field in FIELDS} for row in found]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: not HellaSwag's rows ({type(error).__name__}: {error}); see --help") from error


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    """Rows as JSON lines in ASCII, the default of Python's json."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
