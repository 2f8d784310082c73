"""A token set made on the spot, for a machine without network and without a tokenizer.

    python -m bench.gpu.tokens FOLDER --tokens=8388608 [--text=FILE]

Ids follow each other by a rule that a model can learn: after each of them one of four others, the first most often.
With `--text` they are the bytes of that file instead. Documents begin with the end-of-text token, as in sets that
data_prep makes; there is no vocabulary file, so that text can neither be encoded nor sampled.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from core import storage
from core.data import manifest
from core.data.manifest import Manifest, ShardEntry, Split, TokenizerInfo
from core.data.shard import HEADER_BYTES, shard_bytes
from core.data.vocabulary import FILE_NAME, GPT2_END_OF_TEXT, GPT2_VOCAB_SIZE
from core.errors import DataError

FOLLOWERS, DOCUMENT = (0.5, 0.25, 0.15, 0.1), 512
VAL_SHARE = 16  # one token in so many, at the end, is held out
SHARDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the set goes")
    parser.add_argument("--tokens", type=int, default=1 << 23, help="in all")
    parser.add_argument("--text", type=Path, help="a file whose bytes are the ids")
    options = parser.parse_args()
    make(options.folder, options.tokens, options.text)


def make(folder: str, tokens: int, text: Path | None = None) -> Manifest:
    """Write the set, the manifest last."""
    ids = _of_text(text, tokens) if text else _made_up(tokens)
    train, val = np.split(ids, [len(ids) - len(ids) // VAL_SHARE])
    source = {"kind": "bytes of a file" if text else "made up by bench.gpu.tokens"}
    tokenizer = TokenizerInfo("gpt2", GPT2_VOCAB_SIZE, GPT2_END_OF_TEXT, FILE_NAME, "")
    splits = {"train": _split(folder, "train", train), "val": _split(folder, "val", val)}
    made = Manifest(tokenizer, source, {"rule": f"the last one in {VAL_SHARE} tokens"}, splits)
    manifest.write(folder, made)
    return made


def first_windows(data_url: str, rows: int, length: int) -> np.ndarray:
    """(rows, length) int32: the first windows of the set's first training shard."""
    found = manifest.read(data_url)
    shard = found.split("train", data_url).shards[0]
    count = rows * length
    if shard.tokens < count:
        raise DataError(f"{data_url}: {shard.name} has {shard.tokens} tokens, {rows} windows of {length} take {count}")
    width = found.bits // 8
    data = storage.read_range(storage.join(data_url, shard.name), HEADER_BYTES, HEADER_BYTES + count * width)
    return np.frombuffer(data, f"<u{width}").astype(np.int32).reshape(rows, length)


def _split(folder: str, name: str, ids: np.ndarray) -> Split:
    entries = []
    for number, part in enumerate(np.array_split(ids, SHARDS)):
        data = shard_bytes(part)
        file = f"{name}-{number:05d}.bin"
        storage.write_bytes(storage.join(folder, file), data)
        entries.append(ShardEntry(file, len(part), len(data), hashlib.sha256(data).hexdigest()))
    return Split(len(ids), int((ids == GPT2_END_OF_TEXT).sum()), tuple(entries))


def _made_up(tokens: int) -> np.ndarray:
    random = np.random.default_rng(1)
    # Frequent ids are followed by frequent ids: their logarithm is uniform, which is near what words do.
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
        raise SystemExit(f"{path} has {len(data)} bytes, too few for a token set; name a file of a megabyte or more")
    data[::DOCUMENT] = GPT2_END_OF_TEXT
    return data


if __name__ == "__main__":
    main()
