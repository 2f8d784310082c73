"""Reads plain text. A document is a whole file, or a block of lines between blank lines.

A document's id is the file's path below the source's folder. A block's id also has its number, as in `a.txt#3`.
"""

from collections.abc import Iterator, Mapping

import pyarrow as pa

from core.errors import DataError
from core.settings.preparation import SourceConfig
from data_prep.sources import blocks, lines
from data_prep.sources.files import Fetched, Part, SourceFile

# Largest size of a document. It limits the memory for one document and its tokens.
LARGEST_DOCUMENT_BYTES = 256 << 20


def schema_of(file: SourceFile, source: SourceConfig | None = None) -> pa.Schema:
    """The text column and, unless its name is empty, the id column. The settings name both columns."""
    text = (source and source.text_column) or "text"
    name = "id" if source is None or source.id_column is None else source.id_column
    return pa.schema([(column, pa.large_string()) for column in dict.fromkeys((text, name)) if column])


def read(part: Part, source: SourceConfig, columns: Mapping[str, str], fetched: Fetched) -> Iterator[pa.RecordBatch]:
    """Yields batches in file order. The first of `columns` is the text, the second (optional) the id."""
    name = (part.file.name or part.file.uri.rsplit("/", 1)[-1]).encode()
    content = blocks.content(part.file, fetched)
    if source.text_documents == "file":
        yield _batch([_whole(content, part.file.uri)], [name], columns)
        return
    texts: list[bytes] = []
    first = size = 0
    for text in _between_blank_lines(lines.split(content, part.file.uri), part.file.uri):
        texts.append(text)
        size += len(text)
        if size >= blocks.BLOCK_BYTES:
            yield _batch(texts, _numbered(name, first, len(texts)), columns)
            first, texts, size = first + len(texts), [], 0
    if texts:
        yield _batch(texts, _numbered(name, first, len(texts)), columns)


def _numbered(name: bytes, first: int, count: int) -> list[bytes]:
    return [b"%s#%d" % (name, number) for number in range(first, first + count)]


def _whole(content: Iterator[bytes], uri: str) -> bytes:
    pieces, size = [], 0
    for piece in content:
        pieces.append(piece)
        size += len(piece)
        remedy = "set --source.text_documents=blocks to end documents at blank lines, or split the file"
        _check_size(size, uri, remedy)
    return b"".join(pieces)


def _between_blank_lines(found: Iterator[bytes], uri: str) -> Iterator[bytes]:
    block: list[bytes] = []
    size = 0
    for line in found:
        if line.strip():
            block.append(line)
            size += len(line)
            _check_size(size, uri, "insert blank lines, which end documents")
        elif block:
            yield b"\n".join(block).removesuffix(b"\r")
            block, size = [], 0
    if block:
        yield b"\n".join(block).removesuffix(b"\r")


def _check_size(size: int, uri: str, remedy: str) -> None:
    if size > LARGEST_DOCUMENT_BYTES:
        raise DataError(f"{uri}: has a document of more than {LARGEST_DOCUMENT_BYTES} bytes; {remedy}")


def _batch(texts: list[bytes], names: list[bytes], columns: Mapping[str, str]) -> pa.RecordBatch:
    arrays = [pa.array(values, pa.large_binary()).view(pa.large_string()) for values in (texts, names)][: len(columns)]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))
