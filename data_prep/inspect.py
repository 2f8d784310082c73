"""Shows a dataset: content, source, sample documents and the distribution of document lengths.

python -m data_prep.inspect DATA_URL [--samples=3] [--split=train] [--seed=0]
python -m data_prep.inspect DATA_URL --set=instructions [--length=1024]
python -m data_prep.inspect rows.jsonl [--length=1024]
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
from core.data import manifest, sets, vocabulary
from core.data.manifest import Manifest
from core.data.shard import HEADER_BYTES
from core.errors import ConfigError, DataError
from core.figures import quantity
from data_prep import conversations
from data_prep.sources.rows import is_file_of_rows, read_rows

USAGE = """python -m data_prep.inspect DATA_URL [--samples=3] [--split=train] [--seed=0]
python -m data_prep.inspect DATA_URL --set=instructions [--length=1024]
python -m data_prep.inspect rows.jsonl [--length=1024]

Show the content of the dataset at DATA_URL, decode random documents, and draw the distribution of their lengths.

For a set of conversations or preferences (--set, or a file of rows), show turns, lengths, duplicates, the longest rows,
and the share of tokens that carry loss after a cut at --length tokens. To count tokens, this program reads GPT-2's
vocabulary from DATA_URL or, if it is not there, from VOCAB_URL or tiktoken's download."""
OPTIONS = {"samples": "3", "split": "train", "seed": "0", "set": "", "length": "1024"}
# Number of tokens to read after a random position. It is large enough to contain the start of a document.
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
    numbers_are_whole = all(options[name].isdecimal() for name in ("samples", "seed", "length"))
    if len(urls) != 1 or not numbers_are_whole or int(options["length"]) < 1:
        raise ConfigError("give one DATA_URL, and whole numbers: python -m data_prep.inspect DATA_URL --samples=3")
    url = urls[0]
    console = Console()
    if options["set"] or is_file_of_rows(url):
        _show_rows(console, url, options["set"], int(options["length"]))
        return 0
    made = _manifest(url)
    console.print(_overview(url, made))
    if "length_classes" in made.stats:
        console.print(_lengths(made.stats["length_classes"], "documents"))
    for title, text in _samples(url, made, options["split"], int(options["samples"]), int(options["seed"])):
        console.print(Text(title, style="bold"))
        console.print(Text(text))
        console.print()
    return 0


def _manifest(url: str) -> Manifest:
    try:
        return manifest.read(url)
    except DataError as error:
        stored = [name.removesuffix(".json") for name in storage.list_names(storage.join(url, "sets"))]
        names = [name for name in stored if not name.endswith(".jsonl") and f"{name}.jsonl" in stored]
        if not names or manifest.exists(url):
            raise
        raise DataError(f"{url}: holds no tokens, but sets; name one: --set={' or --set='.join(names)}") from error


def _show_rows(console: Console, url: str, name: str, length: int) -> None:
    """Show the set `name` below `url`. If `name` is empty, show the rows of the file `url`."""
    if name:
        info, rows = sets.info_of(url, name), sets.read(url, name)
        title = f"{url}/sets/{name}.jsonl, {info.schema} from {info.source}, licence {info.licence}"
        schema = info.schema
        place = storage.join(url, vocabulary.FILE_NAME)
    else:
        rows, title, place = read_rows(url), url, ""
        is_pair = bool(rows) and isinstance(rows[0], dict) and {"chosen", "rejected"} <= rows[0].keys()
        schema = "preferences" if is_pair else "conversations"
    if schema not in ("conversations", "preferences"):
        raise ConfigError(f"--set={name}: holds {schema}; only conversations and preferences can be shown")
    if not rows:
        raise DataError(f"{url}: holds no rows; give a file with one row per line")
    vocab_url = place if place and storage.exists(place) else os.environ.get("VOCAB_URL", "")
    found = conversations.measure(rows, schema, vocabulary.elsewhere(vocab_url).encoding(), length)
    for table in conversations.tables(title, found, schema == "preferences"):
        console.print(table)
    if found.lengths:
        console.print(_lengths(conversations.classes(found.lengths), "texts"))


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


def _lengths(classes: list[int], kind: str) -> Table:
    """Histogram of lengths in tokens, of documents or of texts. Each class is twice as wide as the previous class."""
    table = Table(title=f"{kind} by tokens", title_justify="left", box=None)
    table.add_column("tokens", justify="right")
    table.add_column(kind, justify="right")
    table.add_column("")
    used = [index for index, count in enumerate(classes) if count]
    largest = max(classes, default=0)
    for index in range(min(used, default=0), max(used, default=-1) + 1):
        width = classes[index] / largest * BAR_WIDTH
        bar = "█" * int(width) or ("▏" if classes[index] else "")
        table.add_row(f"{2**index:,} to {2 ** (index + 1) - 1:,}", f"{classes[index]:,}", bar)
    return table


def _samples(url: str, made: Manifest, split_name: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of random documents.

    A document is chosen as the first that starts after a uniformly random position.
    """
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
