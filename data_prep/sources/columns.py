"""Finds the columns of text and ids. If the settings do not name a column, common names are tried."""

import difflib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa

from core.errors import DataError
from core.settings.preparation import FilterConfig, SourceConfig
from data_prep.sources import blocks, chat, kinds, lines
from data_prep.sources.files import SourceFile

# Common names of columns in order of preference. `txt` and `__key__` are WebDataset's.
TEXTS = ("text", "content", "txt")
CHATS = ("messages", "conversations", "conversation")
IDS = ("id", "__key__")
CHECK_THREADS = 32


def wanted(source: SourceConfig, keep: FilterConfig) -> dict[str, str]:
    """The columns that these settings read, with their content: `text`, `id` or `number`."""
    found = {source.text_column: "text"}
    if source.id_column:
        found.setdefault(source.id_column, "id")
    if keep.min_score is not None:
        found.setdefault(keep.score_column, "number")
    if keep.languages:
        found.setdefault(keep.language_column, "text")
    return found


def resolved(file: SourceFile, source: SourceConfig, keep: FilterConfig) -> SourceConfig:
    """The settings with the columns of this file filled in.

    Raises DataError if the file has no column of text, or if a column in the settings is missing or of another type.
    """
    kind = kinds.kind_of(file)
    schema = kind.schema(file, source)
    if not schema.names:  # the file has no valid rows, which the reader will report
        return replace(source, text_column=source.text_column or TEXTS[0], id_column=source.id_column or "")
    text = source.text_column if source.text_column is not None else _text(schema, file.uri)
    key = source.id_column if source.id_column is not None else _id(schema, text)
    source = replace(source, text_column=text, id_column=key)
    if kind.columns == "by row":
        _check_type(schema, file.uri, _present(schema, file.uri, text), "text")
    else:
        check(file, source, keep)
    return source


def check(file: SourceFile, source: SourceConfig, keep: FilterConfig) -> None:
    """Raises DataError if a column is missing or has an unsuitable type."""
    kind = kinds.kind_of(file)
    if kind.columns == "none" and (keep.min_score is not None or keep.languages):
        raise DataError(f"{file.uri}: plain text has no columns; unset filter.min_score and filter.languages")
    if kind.columns == "fixed":
        schema = kind.schema(file, source)
        for column, holds in wanted(source, keep).items() if schema.names else ():
            hint = "; set --source.id_column= (empty) to use the text's hash" if holds == "id" else ""
            _check_type(schema, file.uri, _present(schema, file.uri, column, hint), holds)


def check_all(files: Sequence[SourceFile], source: SourceConfig, keep: FilterConfig) -> None:
    """Opens every file and checks its columns. Raises DataError, StorageError."""
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        ours = (file for file in files if not kinds.is_streamed(file))
        for _ in pool.map(lambda file: _open(file, source, keep), ours):
            pass
    for file in filter(kinds.is_streamed, files):  # `datasets` opens one file at a time
        check(file, source, keep)


def _open(file: SourceFile, source: SourceConfig, keep: FilterConfig) -> None:
    check(file, source, keep)
    kind = kinds.kind_of(file)
    if kind.columns == "fixed" or not (kind.read is lines.read or blocks.compression_of(file.uri)):
        return
    schema = lines.schema_of_rows(blocks.sample(file))
    if kind.read is lines.read and schema.names:
        _check_type(schema, file.uri, _present(schema, file.uri, source.text_column), "text")


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests similar names, as the end of an error message."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _text(schema: pa.Schema, uri: str) -> str:
    by_name = {name.lower(): name for name in reversed(schema.names)}
    for names, fits in ((TEXTS, _holds_text), (CHATS, chat.is_chat)):
        for name in names:
            found = by_name.get(name)
            if found and (fits(schema.field(found).type) or schema.field(found).type == pa.null()):
                return found
    texts = [name for name in schema.names if _is_text(schema.field(name).type) and name.lower() not in IDS]
    if len(texts) == 1:
        return texts[0]
    described = ", ".join(f"{field.name} ({_described(field.type)})" for field in schema)
    raise DataError(
        f"{uri}: has no column {', '.join(TEXTS[:2])} or {CHATS[0]}, only {described or 'none'}; "
        "name the one with the documents: --source.text_column=..."
    )


def _id(schema: pa.Schema, text: str) -> str:
    """The name of the column of ids. If there is none, the result is "", and the hash of the text replaces the id."""
    fitting = (name for name in IDS if name in schema.names and name != text)
    return next((name for name in fitting if _holds_text(schema.field(name).type) or _is_number(schema, name)), "")


def _present(schema: pa.Schema, uri: str, column: str, hint: str = "") -> str:
    if column not in schema.names:
        meant = nearest(column, schema.names)
        raise DataError(f"{uri}: has no column {column!r}, only {', '.join(schema.names) or 'none'}{meant or hint}")
    if schema.names.count(column) > 1:
        raise DataError(f"{uri}: has {schema.names.count(column)} columns {column!r}; rename all but one")
    return column


def _check_type(schema: pa.Schema, uri: str, column: str, holds: str) -> None:
    kind = schema.field(column).type
    if kind == pa.null():  # all values in the first rows are null
        return
    numeric = _is_number(schema, column)
    if holds == "number" and not numeric:
        raise DataError(f"{uri}: column {column!r} is {_described(kind)}, filter.min_score needs numbers")
    if not (_holds_text(kind) or (holds == "text" and chat.is_chat(kind)) or (numeric and holds != "text")):
        raise DataError(f"{uri}: column {column!r} is {_described(kind)}, not text; name another column")
    if not chat.is_chat(kind) and not _casts(kind, pa.float64() if holds == "number" else pa.large_string()):
        raise DataError(
            f"{uri}: column {column!r} is {_described(kind)}, which Arrow {pa.__version__} cannot convert; "
            "write it as strings or as 64-bit numbers"
        )


def _casts(kind: pa.DataType, target: pa.DataType) -> bool:
    try:
        pa.nulls(0, kind).cast(target)  # pa.array would import pandas
    except pa.ArrowException:
        return False
    return True


def _described(kind: pa.DataType) -> str:
    text = str(kind).replace("large_", "")
    return text if len(text) <= 40 else text[:37] + "..."


def _is_number(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)


def _holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold text. Hive, Impala and others write strings as plain bytes."""
    return _is_text(kind) or kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
