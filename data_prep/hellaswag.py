"""HellaSwag's validation set (Zellers et al. 2019; MIT licence), all 10,042 items and nothing else.

Copies differ in the order of fields and in the type of the label. Whatever the copy, the rows are written in one
form and compared with that form's checksum, so that scores are comparable with everyone's.
"""

import hashlib
from typing import Any

from core import storage
from core.data import sets
from core.data.sets import SetInfo
from core.errors import DataError
from data_prep import rows

NAME = "hellaswag"
SOURCE = "hf://datasets/Rowan/hellaswag/data/validation-00000-of-00001.parquet"
# The authors' own file, hellaswag_val.jsonl in github.com/rowanz/hellaswag: 12,246,618 bytes.
FILE_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
# Our form of the Hub's rows. It has the size of the authors' file, whose fields come in varying order.
ROWS_SHA256 = "dc1be2fa1bef56aab8e92a5be597a617e363b09239fa66822939d7fb7a8da4ec"
FIELDS = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "split", "split_type", "label", "endings", "source_id")
SCHEMA = "hellaswag"


def store(data_url: str, source: str) -> SetInfo:
    """Store the set below `data_url`. Raises DataError unless `source` holds exactly the published rows."""
    found = rows.read(source)
    data = canonical(found, source)
    digest = hashlib.sha256(data).hexdigest()
    if digest != ROWS_SHA256 and hashlib.sha256(storage.read_bytes(source)).hexdigest() != FILE_SHA256:
        raise DataError(
            f"{source}: its {len(found)} rows have the checksum {digest[:12]}…, HellaSwag's validation set has "
            f"{ROWS_SHA256[:12]}…; give the authors' hellaswag_val.jsonl or the Hub's Rowan/hellaswag"
        )
    return sets.write(data_url, NAME, SCHEMA, source, "MIT", data)


def canonical(found: list[Any], where: str) -> bytes:
    """The rows in one form: FIELDS in order, labels as numbers."""
    try:
        return rows.lines(
            [{field: int(row[field]) if field == "label" else row[field] for field in FIELDS} for row in found]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: no HellaSwag rows ({type(error).__name__}: {error}); see --help") from error
