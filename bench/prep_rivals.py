"""Runs one side of bench.prep as one process with children, which bench.prep measures.

    python -m bench.prep_rivals fineweb SOURCE TARGET      tiktoken, a process pool over documents
    python -m bench.prep_rivals map SOURCE TARGET          datasets.map with tiktoken, in batches
    python -m bench.prep_rivals read SOURCE TARGET         our reader alone: download, decompress, decode

`fineweb` follows build-nanogpt's fineweb.py and llm.c's dev/data/fineweb.py: `load_dataset`, `Pool.imap` with chunks of
16 documents, half of the cores, shards of 100 million uint16 tokens. `map` follows nanoGPT's
data/openwebtext/prepare.py, in batches. Here, both sides also transfer files: they first download all files, and upload
the shards at the end. SOURCE and TARGET are folders in a bucket. If TARGET is `memory`, nothing is stored.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import harness
from core import storage

SHARD_TOKENS = 10**8
_encoding = None
_encode_share = None


def main(arguments: list[str]) -> None:
    side, source, target = arguments
    with tempfile.TemporaryDirectory() as scratch:
        {"fineweb": fineweb, "map": mapped, "read": read}[side](source, target, Path(scratch))


def fineweb(source: str, target: str, scratch: Path) -> None:
    rows = _load(source, scratch)
    shard, used, number = np.empty(SHARD_TOKENS, np.uint16), 0, 0
    with multiprocessing.get_context("fork").Pool(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for tokens in pool.imap(tokenize, rows, chunksize=16):
            if used + len(tokens) >= SHARD_TOKENS:
                rest = SHARD_TOKENS - used
                shard[used:] = tokens[:rest]
                _store(shard, target, number)
                number += 1
                shard[: len(tokens) - rest] = tokens[rest:]
                used = len(tokens) - rest
            else:
                shard[used : used + len(tokens)] = tokens
                used += len(tokens)
    _store(shard[:used], target, number)


def mapped(source: str, target: str, scratch: Path) -> None:
    rows = _load(source, scratch)

    def encode(batch: dict) -> dict:
        texts = _tokenizer().encode_ordinary_batch(batch["text"], num_threads=1)
        return {"ids": [np.array([50256, *ids], np.uint16) for ids in texts]}

    done = rows.map(encode, batched=True, remove_columns=rows.column_names, num_proc=os.cpu_count())
    for number, start in enumerate(range(0, len(done), 50_000)):
        part = done.with_format("numpy")[start : start + 50_000]["ids"]
        _store(np.concatenate(part).astype(np.uint16), target, number)


def read(source: str, target: str, scratch: Path) -> None:
    from core.data.vocabulary import store_vocabulary
    from core.settings import loader as settings
    from core.settings.preparation import PrepConfig
    from data_prep import plan, workers

    flags = [f"--source.url={source}/*.parquet", f"--data.url={scratch}/set", "--data.part_bytes=8000000"]
    config = settings.load(PrepConfig, flags, os.environ)
    config, todo = plan.make(config)
    job = workers.PrepJob(config, todo.sha256, store_vocabulary(config.tokenizer.vocab_url, config.data.url))
    workers.run(decode, job, todo.parts, os.cpu_count() or 1, lambda count: None)


def decode(part, work):
    """Task of a worker: fetch and decode the texts and ids of a part, and discard them."""
    from data_prep import workers
    from data_prep.sources import parquet

    for _ in parquet.read(part, None, ["text", "id"], work.fetched):
        pass
    return workers.Done()


def tokenize(document: dict) -> np.ndarray:
    """A copy of the function `tokenize` of build-nanogpt."""
    encoding = _tokenizer()
    tokens = [encoding._special_tokens["<|endoftext|>"]]
    tokens.extend(encoding.encode_ordinary(document["text"]))
    array = np.array(tokens)
    assert ((array >= 0) & (array < 2**16)).all()
    return array.astype(np.uint16)


def _tokenizer():
    global _encoding
    if _encoding is None:
        from core.data import vocabulary

        _encoding = vocabulary.read(os.environ["VOCAB_URL"]).encoding()
    return _encoding


def _load(source: str, scratch: Path):
    """Download the files and open them with `datasets`, which caches in the scratch folder."""
    for info in storage.list_objects(source):
        storage.download(info.uri, scratch / "source" / info.name)
    os.environ["HF_DATASETS_CACHE"] = str(scratch / "cache")
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    files = sorted(str(path) for path in (scratch / "source").iterdir())
    return load_dataset(Path(files[0]).suffix[1:], data_files=files, split="train")


def _store(tokens: np.ndarray, target: str, number: int) -> None:
    if target != "memory":
        storage.write_bytes(f"{target}/{number:06d}.bin", tokens.tobytes())


# --- encode only: text in memory, tokens in memory -------------------------------------------------------------


def encode_only(side: str, files: list[Path]) -> float:
    """Seconds that one side takes to encode the text of these files, without reading them."""
    import pyarrow.parquet as pq

    batches = [batch for file in files for batch in pq.ParquetFile(file).iter_batches(2000, columns=["text"])]
    if side == "ours":
        return _timed(_ours(batches))
    documents = [{"text": text} for batch in batches for text in batch.column("text").to_pylist()]
    del batches
    with multiprocessing.get_context("fork").Pool(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return _timed(pool.imap(tokenize, documents, chunksize=16))


def _ours(batches: list) -> Iterator[int]:
    import pyarrow as pa

    from core.data import vocabulary
    from data_prep.encode import GigatokenEngine

    global _encode_share
    cores = os.cpu_count() or 1
    engine = GigatokenEngine(vocabulary.read(os.environ["VOCAB_URL"]))

    def encode_share(share: int) -> int:
        texts = (batch.column("text").cast(pa.large_string()) for batch in batches[share::cores])
        return sum(len(engine.encode(each)[0]) for each in texts)

    _encode_share = encode_share  # the forked processes inherit this function, with the text
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        yield 0
        yield from pool.imap(_share, range(cores))


def _share(number: int) -> int:
    return _encode_share(number)


def _timed(results: Iterator) -> float:
    """Seconds for all results except the first.

    For `ours`, the first result only shows that the processes are running.
    """
    next(results)
    started = time.perf_counter()
    for _ in results:
        pass
    return time.perf_counter() - started


if __name__ == "__main__":
    if sys.argv[1] == "encode":
        seconds = encode_only(sys.argv[2], [Path(argument) for argument in sys.argv[3:]])
        harness.say(f"{sys.argv[2]}: {seconds:.2f} s", seconds=seconds)
    else:
        main(sys.argv[1:])
