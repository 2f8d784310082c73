"""Shows a dataset: content, source, sample documents and the distribution of document lengths.

python -m data_prep.inspect DATA_URL [--samples=3] [--split=train] [--seed=0]
"""

import os
import random
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core import storage
from core.console import run_entry
from core.data import manifest, vocabulary
from core.data.manifest import Manifest
from core.data.shard import HEADER_BYTES
from core.errors import ConfigError
from core.figures import quantity

USAGE = """python -m data_prep.inspect DATA_URL [--samples=3] [--split=train] [--seed=0]

Show the content of the dataset at DATA_URL, decode random documents, and draw the distribution of their lengths."""
OPTIONS = {"samples": "3", "split": "train", "seed": "0"}
# Tokens to read after a random position: enough to contain the start of a document.
WINDOW_TOKENS = 1 << 16
SAMPLE_TOKENS = 120
BAR_WIDTH = 40


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    options = dict(OPTIONS)
    urls = []
    for argument in arguments:
        key, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            urls.append(argument)
        elif separator and key in OPTIONS:
            options[key] = value
        else:
            raise ConfigError(
                f"flag {argument}: unknown; known flags: {', '.join(f'--{k}={v}' for k, v in OPTIONS.items())}"
            )
    urls = urls or [url for url in [os.environ.get("DATA_URL")] if url]
    if len(urls) != 1 or not (options["samples"].isdigit() and options["seed"].isdigit()):
        raise ConfigError("give one DATA_URL, and whole numbers: python -m data_prep.inspect DATA_URL --samples=3")
    url = urls[0]
    made = manifest.read(url)
    console = Console()
    console.print(_overview(url, made))
    if "length_classes" in made.stats:
        console.print(_lengths(made.stats["length_classes"]))
    for title, text in _samples(url, made, options["split"], int(options["samples"]), int(options["seed"])):
        console.print(Text(title, style="bold"))
        console.print(Text(text))
        console.print()
    return 0


def _overview(url: str, made: Manifest) -> Table:
    table = Table(title=f"{url} (fingerprint {made.fingerprint[:12]})", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, split in made.splits.items():
        sizes = [shard.tokens for shard in split.shards]
        mean = f"{split.tokens / split.documents:,.0f} per document" if split.documents else ""
        table.add_row(name, f"{split.tokens:,} tokens, {split.documents:,} documents, {mean}")
        if sizes:
            table.add_row("", f"{len(sizes)} shards of {min(sizes):,} to {max(sizes):,} tokens")
    for key in ("text_bytes", "dropped"):
        if made.stats.get(key):
            value = made.stats[key]
            words = ", ".join(f"{n:,} {k}" for k, n in value.items()) if isinstance(value, dict) else quantity(value)
            table.add_row(key.replace("_", " "), words)
    if made.stats.get("text_bytes"):
        table.add_row("bytes per token", f"{made.stats['text_bytes'] / made.stats['tokens']:.2f}")
    table.add_row("tokenizer", f"{made.tokenizer.name}, {made.tokenizer.vocab_size} ids, {made.tokenizer.vocab_file}")
    for heading, values in (("source", made.source), ("split", made.split_rule)):
        for key, value in values.items():
            table.add_row(f"{heading} {key}", str(value))
    return table


def _lengths(classes: list[int]) -> Table:
    """Histogram of document lengths in tokens. Each class is twice as wide as the one before."""
    table = Table(title="documents by tokens", title_justify="left", box=None)
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    used = [index for index, count in enumerate(classes) if count]
    largest = max(classes, default=0)
    for index in range(min(used, default=0), max(used, default=-1) + 1):
        width = classes[index] / largest * BAR_WIDTH
        bar = "█" * int(width) or ("▏" if classes[index] else "")
        table.add_row(f"{2**index:,} to {2 ** (index + 1) - 1:,}", f"{classes[index]:,}", bar)
    return table


def _samples(url: str, made: Manifest, split_name: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of the documents that start after uniformly random positions."""
    split = made.split(split_name, url)
    encoding = vocabulary.read(storage.join(url, made.tokenizer.vocab_file)).encoding()
    chance = random.Random(seed)
    width = made.bits // 8
    for _ in range(count):
        shard = chance.choices(split.shards, weights=[shard.tokens for shard in split.shards])[0]
        at = chance.randrange(shard.tokens)
        end = min(shard.tokens, at + WINDOW_TOKENS)
        data = storage.read_range(storage.join(url, shard.name), HEADER_BYTES + at * width, HEADER_BYTES + end * width)
        tokens = np.frombuffer(data, f"<u{width}")
        marks = np.flatnonzero(tokens == made.tokenizer.end_of_text)
        start = int(marks[0]) + 1 if len(marks) else 0
        stop = int(marks[1]) if len(marks) > 1 else len(tokens)
        shown = tokens[start : min(stop, start + SAMPLE_TOKENS)].tolist()
        what = f"{stop - start:,} tokens" if len(marks) > 1 else "cut off"
        yield f"{shard.name}, token {at + start:,} ({what})", encoding.decode(shown)


if __name__ == "__main__":
    run_entry(main, shows=True)
