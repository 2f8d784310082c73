"""Chooses the parts of a preparation with a limited number of training tokens (data.train_tokens).

The seed determines a random order of the parts. The dataset consists of the first parts in this order that together
hold enough tokens. So the result depends neither on the number of workers nor on interruptions, and a larger limit only
adds parts.
"""

import hashlib

from data_prep import part as parts
from data_prep.plan import PrepPlan, done_parts
from data_prep.sources.files import Part

LIMIT = "data.train_tokens"
# Assumed source bytes per token, until a finished part shows the true number. It is the value of FineWeb-Edu's parquet
# files.
BYTES_PER_TOKEN = 2.8


def needed(plan: PrepPlan, data_url: str, at_first: bool = False) -> list[Part]:
    """The parts that the dataset needs, in the random order that the seed determines.

    If the number of tokens is not limited, these are all parts. The tokens of an unfinished part are estimated, so the
    number of parts may change. If `at_first` is true, every part counts as unfinished. The result is then the same on
    every node at any time.
    """
    limit = plan.settings.get(LIMIT, 0)
    if not limit:
        return plan.parts
    seed, done = plan.settings["data.seed"], set() if at_first else done_parts(data_url)
    found: list[Part] = []
    read_bytes, read_tokens, expected = 0, 0, 0.0
    for each in sorted(plan.parts, key=lambda part: order(part.name, seed)):
        if expected >= limit:
            break
        found.append(each)
        size = each.end - each.start
        if each.name in done:
            tokens = sum(shard.tokens for shard in parts.read_record(data_url, each.name).shards)
            read_bytes, read_tokens = read_bytes + size, read_tokens + tokens
            expected += tokens
        else:
            expected += size * read_tokens / read_bytes if read_tokens else size / BYTES_PER_TOKEN
    return found


def missing(plan: PrepPlan, data_url: str) -> list[Part]:
    """The needed parts that are unfinished."""
    found, done = needed(plan, data_url), done_parts(data_url)
    return [part for part in found if part.name not in done]


def order(value: int | str, seed: int) -> int:
    """A position in a shuffle, the same on every machine and with every version of NumPy."""
    digest = hashlib.blake2b(str(value).encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")
