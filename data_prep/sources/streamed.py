"""Streams CSV, Arrow, WebDataset and other files that only `datasets` can read.

`datasets` opens the file through an fsspec file system over our storage, so that locations, credentials, retries and
progress work as for other files. Each file is one part. Memory holds a few blocks of bytes and one batch. A batch is
ROWS rows of CSV, or one batch of the Arrow file.
"""

import contextlib
import io
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa

from core.errors import DataError, LauncherError
from core.settings.preparation import SourceConfig
from data_prep.sources import blocks
from data_prep.sources.files import Fetched, Part, SourceFile, has_suffix, path_of

PROTOCOL = "prepsource"
# For each file suffix: a module of `datasets`, and its settings.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".arrow": ("arrow", {}),
    ".tar": ("webdataset", {}),
    ".json": ("json", {}),
}
ROWS = 500
BUFFER_BYTES = 1 << 20
_NUMBERS_ABSENT = ["", "NA", "N/A", "NaN", "nan", "null", "None"]


@lru_cache(maxsize=4)
def schema_of(file: SourceFile, source: SourceConfig | None = None) -> pa.Schema:
    """The columns of the first rows. The result is empty if the file has no rows.

    A column without values has the type null. Raises DataError.
    """
    with _rows(file, {}, lambda count: None) as batches:
        first = next(batches, None)
    if first is None:
        return pa.schema([])
    empty = [column.null_count == len(column) for column in first.columns]
    return pa.schema((pa.field(f.name, pa.null()) if no else f) for f, no in zip(first.schema, empty, strict=True))


def read(
    part: Part, source: SourceConfig | None, columns: Mapping[str, str], fetched: Fetched
) -> Iterator[pa.RecordBatch]:
    """Yields batches of `columns` in file order. Raises DataError for a file that `datasets` cannot read."""
    with _rows(part.file, columns, fetched) as batches:
        for table in batches:
            yield from table.select(list(columns)).combine_chunks().to_batches()


def reader_of(uri: str) -> tuple[str, dict[str, Any]] | None:
    """The module of `datasets` and its settings for a file's suffix, or None."""
    return next((reader for suffix, reader in READERS.items() if has_suffix(_plain(uri), (suffix,))), None)


def _plain(uri: str) -> str:
    """The path without a suffix such as .gz, because `datasets` gets the decompressed file."""
    path = path_of(uri)
    return path.rsplit(".", 1)[0] if blocks.compression_of(uri) else path


@contextlib.contextmanager
def _rows(file: SourceFile, columns: Mapping[str, str], fetched: Fetched) -> Iterator[Iterator[pa.Table]]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    module, options = (file.reader, json.loads(file.options or "{}")) if file.reader else reader_of(file.uri)
    with tempfile.TemporaryDirectory() as cache, _opened(file, fetched) as address, _explained(file, module):
        builder = datasets.load_dataset_builder(
            module, data_files=[address], cache_dir=cache, **_settings(module, columns), **options
        )
        stream = builder.as_streaming_dataset(split="train")
        if isinstance(builder, datasets.ArrowBasedBuilder):
            yield stream.with_format("arrow").iter(batch_size=ROWS)
        else:  # rows are Python objects, whose fields may differ in order
            wanted = stream.select_columns(list(columns)) if columns else stream
            yield (pa.table(batch) for batch in wanted.iter(batch_size=ROWS))


def _settings(module: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """Settings that keep CSV's text unconverted and its batches small."""
    if module != "csv":
        return {}
    if not columns:  # infers the types
        return {"chunksize": ROWS}
    import datasets

    types = {"text": "string", "id": "string", "number": "float64"}
    features = {name: datasets.Value(types[holds]) for name, holds in columns.items()}
    absent = {name: _NUMBERS_ABSENT for name, holds in columns.items() if holds == "number"}
    return {
        "chunksize": ROWS,
        "features": datasets.Features(features),
        "keep_default_na": False,
        "na_values": absent,
    }


@contextlib.contextmanager
def _explained(file: SourceFile, module: str) -> Iterator[None]:
    """Converts errors of `datasets` to a DataError about the file."""
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None and not isinstance(link, LauncherError):
            link = link.__cause__ or link.__context__
        if link is not None:
            raise link from error
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{file.uri}: cannot be read as {module} ({said[:160]}); correct the file, or convert it to parquet"
        ) from error


# --- the file system for `datasets` ----------------------------------------------------------------------------


@dataclass
class _Entry:
    """A file for `datasets`. It remembers the furthest position that was read, so that repeated reads count once."""

    file: SourceFile
    fetched: Fetched
    furthest: int = 0
    streams: list[blocks.Stream] = field(default_factory=list)

    def reached(self, position: int) -> None:
        if position > self.furthest:
            self.fetched(position - self.furthest)
            self.furthest = position

    def close(self) -> None:
        """Closes the streams that `datasets` has opened, because it sometimes leaves them open."""
        for stream in self.streams:
            stream.close()

    def open(self) -> io.BufferedReader:
        if blocks.compression_of(self.file.uri):
            stream = blocks.Stream(blocks.content(self.file, self.fetched))
        else:
            stream = blocks.SeekableStream(self.file, self.reached)
        self.streams.append(stream)
        # Arrow interprets a short read as the end of the file.
        return io.BufferedReader(stream, BUFFER_BYTES)


_entries: dict[str, _Entry] = {}
_numbers = itertools.count()


@contextlib.contextmanager
def _opened(file: SourceFile, fetched: Fetched) -> Iterator[str]:
    """Yields an address at which `datasets` finds the file, with the file's suffix and without special characters."""
    _register()
    suffix = _plain(file.uri).rsplit("/", 1)[-1].rpartition(".")[2].lower()
    name = f"{next(_numbers)}.{suffix}"
    _entries[name] = _Entry(file, fetched)
    try:
        yield f"{PROTOCOL}://{name}"
    finally:
        _entries.pop(name).close()


@lru_cache(maxsize=1)
def _register() -> None:
    import fsspec
    from fsspec.spec import AbstractFileSystem

    class SourceFileSystem(AbstractFileSystem):
        protocol = PROTOCOL
        cachable = False

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            name = self._strip_protocol(path)
            if name not in _entries:
                raise FileNotFoundError(path)
            size = _entries[name].file.size
            return {"name": name, "size": size, "type": "file"}

        def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
            return [self.info(path)] if detail else [self._strip_protocol(path)]

        def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BufferedReader:
            return _entries[self._strip_protocol(path)].open()

    fsspec.register_implementation(PROTOCOL, SourceFileSystem)
