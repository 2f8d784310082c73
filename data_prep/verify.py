"""Reads a whole dataset and checks it against its manifest.

    python -m data_prep.verify DATA_URL

Checks header, size, SHA-256 and token ids of every shard, and the vocabulary file. Prints one line per problem. A file
that the store does not deliver is counted separately, and not as damaged. Exits with 0 only if every file was read and
matches.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from core import storage
from core.console import progress, run_entry, set_up_logging
from core.data import manifest, vocabulary
from core.data.manifest import Manifest, ShardEntry
from core.data.shard import HEADER_BYTES, check_size, parse_header
from core.errors import ConfigError, LauncherError, ObjectDamaged, ObjectNotFound, StorageError
from core.figures import counted

log = logging.getLogger(__name__)

USAGE = "python -m data_prep.verify DATA_URL\n\nRead every shard below DATA_URL and check it against the manifest."
READ_BYTES = 16 << 20
THREADS = 4


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    urls = arguments or [url for url in [os.environ.get("DATA_URL")] if url]
    if len(urls) != 1 or urls[0].startswith("-"):
        raise ConfigError("give exactly one DATA_URL: python -m data_prep.verify DATA_URL")
    set_up_logging()
    url = urls[0]
    made = manifest.read(url)
    problems = list(problems_of(url, made))
    for problem in problems:
        print(problem.sentence)
    shards = sum(len(split.shards) for split in made.splits.values())
    tokens = sum(split.tokens for split in made.splits.values())
    damaged = sum(problem.is_damage for problem in problems)
    if damaged:
        print(f"{url}: {counted(damaged, 'problem')} in {shards} shards; delete the set and prepare it again")
    if unread := len(problems) - damaged:
        rest = "" if damaged else ", and the others match the manifest"
        print(f"{url}: {counted(unread, 'file')} could not be read{rest}; run the same command again")
    if problems:
        return 1
    print(f"{url}: {shards} shards with {tokens:,} tokens match the manifest (fingerprint {made.fingerprint[:12]})")
    return 0


@dataclass(frozen=True)
class Problem:
    """One sentence about a problem of a file.

    If `is_damage` is false, the file could not be read, and may be undamaged.
    """

    sentence: str
    is_damage: bool = True


def problems_of(data_url: str, made: Manifest) -> Iterator[Problem]:
    """Yields at most one problem per file."""
    vocab_uri = storage.join(data_url, made.tokenizer.vocab_file)
    try:
        if vocabulary.read(vocab_uri).sha256 != made.tokenizer.vocab_sha256:
            yield Problem(f"{vocab_uri}: is not the vocabulary that the manifest names")
    except LauncherError as error:
        yield _problem(error)
    shards = [shard for split in made.splits.values() for shard in split.shards]
    total = sum(shard.bytes for shard in shards)
    with progress("verify", total, "bytes") as bar, ThreadPoolExecutor(THREADS) as pool:
        for shard, problem in zip(shards, pool.map(lambda each: _check(data_url, each, made), shards), strict=True):
            bar.advance(shard.bytes)
            if problem:
                yield problem


def _problem(error: LauncherError) -> Problem:
    return Problem(str(error), not isinstance(error, StorageError) or isinstance(error, ObjectNotFound | ObjectDamaged))


def _check(data_url: str, shard: ShardEntry, made: Manifest) -> Problem | None:
    """The first problem of a shard, or None."""
    uri = storage.join(data_url, shard.name)
    try:
        size = storage.size_of(uri)
        header_bytes = storage.read_range(uri, 0, min(size, HEADER_BYTES))
        header = parse_header(header_bytes, uri)
        check_size(header, size, uri)
        if (header.tokens, header.bits) != (shard.tokens, made.bits):
            return Problem(
                f"{uri}: holds {header.tokens} tokens of {header.bits} bits, "
                f"the manifest says {shard.tokens} of {made.bits}"
            )
        digest = hashlib.sha256(header_bytes)
        for start in range(HEADER_BYTES, size, READ_BYTES):
            data = storage.read_range(uri, start, min(size, start + READ_BYTES))
            digest.update(data)
            tokens = np.frombuffer(data, header.dtype)
            if int(tokens.max()) >= made.tokenizer.vocab_size:
                wrong = int(np.argmax(tokens >= made.tokenizer.vocab_size))
                position = (start - HEADER_BYTES) // header.dtype.itemsize + wrong
                last = made.tokenizer.vocab_size - 1
                return Problem(f"{uri}: token {position} is {tokens[wrong]}, but ids end at {last}")
    except LauncherError as error:
        return _problem(error)
    if digest.hexdigest() != shard.sha256:
        return Problem(f"{uri}: SHA-256 is {digest.hexdigest()[:12]}…, the manifest says {shard.sha256[:12]}…")
    return None


if __name__ == "__main__":
    run_entry(main)
