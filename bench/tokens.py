"""Writes datasets of generated tokens, for benchmarks and for machines without network and tokenizer.

    python -m bench.tokens FOLDER --tokens=8388608 [--text=FILE]

A model can learn the generated ids: each id is followed by one of four other ids, most often by the first of the four.
If `--text` is given, the ids are the bytes of a file. Documents begin with the end-of-text token, as data_prep writes
them. The dataset has no vocabulary file, so that text can be neither encoded nor sampled.
"""

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from core import storage
from core.data import manifest
from core.data.manifest import Manifest, ShardEntry, Split, TokenizerInfo
from core.data.shard import HEADER_BYTES, shard_bytes
from core.data.vocabulary import FILE_NAME, GPT2_END_OF_TEXT, GPT2_VOCAB_SIZE
from core.errors import DataError

FOLLOWERS, DOCUMENT = (0.5, 0.25, 0.15, 0.1), 512
VAL_SHARE = 16  # the last 1 / VAL_SHARE of the tokens are for validation
SHARDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder or URL of the dataset")
    parser.add_argument("--tokens", type=int, default=1 << 23, help="number of tokens of both splits together")
    parser.add_argument("--text", type=Path, help="a file whose bytes become the token ids")
    options = parser.parse_args()
    make(options.folder, options.tokens, options.text)


def make(folder: str, tokens: int, text: Path | None = None) -> Manifest:
    """Write a dataset of `tokens` tokens: the bytes of `text`, or generated ids."""
    ids = _of_text(text, tokens) if text else _generated(tokens)
    train, val = np.split(ids, [len(ids) - len(ids) // VAL_SHARE])
    source = {"kind": "bytes of a file" if text else "made up by bench.tokens"}
    return write(folder, {"train": np.array_split(train, SHARDS), "val": np.array_split(val, SHARDS)}, source)


def random_ids(count: int, seed: int) -> np.ndarray:
    """Random ids (count,), uint16, uniform over GPT-2's vocabulary."""
    return np.random.default_rng(seed).integers(0, GPT2_VOCAB_SIZE, count, dtype=np.uint16)


def write(
    folder: str,
    splits: Mapping[str, Iterable[np.ndarray]],
    source: Mapping[str, str] = {},
    vocab_size: int = GPT2_VOCAB_SIZE,
) -> Manifest:
    """Write one shard per array of ids below `vocab_size`, and the manifest last."""
    tokenizer = TokenizerInfo("gpt2", vocab_size, min(GPT2_END_OF_TEXT, vocab_size - 1), FILE_NAME, "")
    written = {name: _split(folder, name, shards) for name, shards in splits.items()}
    made = Manifest(tokenizer, dict(source), {"rule": f"the last one in {VAL_SHARE} tokens"}, written)
    manifest.write(folder, made)
    return made


def first_windows(data_url: str, rows: int, length: int) -> np.ndarray:
    """(rows, length) int32: the first windows of the dataset's first training shard. Raises DataError."""
    found = manifest.read(data_url)
    shard = found.split("train", data_url).shards[0]
    count = rows * length
    if shard.tokens < count:
        raise DataError(f"{data_url}: {shard.name} has {shard.tokens} tokens, {rows} windows of {length} take {count}")
    width = found.bits // 8
    data = storage.read_range(storage.join(data_url, shard.name), HEADER_BYTES, HEADER_BYTES + count * width)
    return np.frombuffer(data, f"<u{width}").astype(np.int32).reshape(rows, length)


def _split(folder: str, name: str, shards: Iterable[np.ndarray]) -> Split:
    entries, documents = [], 0
    for number, ids in enumerate(shards):
        data = shard_bytes(ids)
        file = f"{name}-{number:05d}.bin"
        storage.write_bytes(storage.join(folder, file), data)
        entries.append(ShardEntry(file, len(ids), len(data), hashlib.sha256(data).hexdigest()))
        documents += int((ids == GPT2_END_OF_TEXT).sum())
    return Split(sum(entry.tokens for entry in entries), documents, tuple(entries))


def _generated(tokens: int) -> np.ndarray:
    random = np.random.default_rng(1)
    # The logarithm of a follower's id is uniform, so small ids are frequent. The frequencies of ids resemble those of
    # words.
    follower_of = np.exp(random.uniform(0, np.log(GPT2_END_OF_TEXT), (GPT2_END_OF_TEXT, len(FOLLOWERS))))
    follower_of = np.minimum(follower_of, GPT2_END_OF_TEXT - 1).astype(np.uint16)
    documents = -(-tokens // DOCUMENT)
    ids = np.empty((documents, DOCUMENT), np.uint16)
    ids[:, 0] = GPT2_END_OF_TEXT
    ids[:, 1] = random.integers(0, GPT2_END_OF_TEXT, documents)
    for place in range(2, DOCUMENT):
        which = random.choice(len(FOLLOWERS), documents, p=FOLLOWERS)
        ids[:, place] = follower_of[ids[:, place - 1], which]
    return ids.reshape(-1)[:tokens]


def _of_text(path: Path, tokens: int) -> np.ndarray:
    data = np.fromfile(path, np.uint8, tokens).astype(np.uint16)
    if len(data) < 2 * VAL_SHARE * DOCUMENT:
        raise SystemExit(f"{path} has {len(data)} bytes, too few for a dataset; name a file of a megabyte or more")
    data[::DOCUMENT] = GPT2_END_OF_TEXT
    return data


if __name__ == "__main__":
    main()
