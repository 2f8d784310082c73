"""Mutations of all that is read from a bucket or a client: an error of ours or a result, never a traceback, never a
file outside."""

import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from core import storage, untrusted
from core.data import manifest
from core.errors import LauncherError, RunError
from core.run import journal
from core.run.folder import RunFolder, id_of, open_run, read_description
from core.run.reader import Detail, read_run, spent_usd_at_most
from core.settings.inference import Sampling
from core.settings.model import ModelConfig
from core.storage import ObjectInfo
from costs import compare, page, render
from costs.report import build
from launch import runs
from tests import checkpoints, hostile
from tests.golden import NOON, preempted_and_resumed
from tests.test_manifest import GOOD
from trainer.checkpoint import blocks, layout
from trainer.data.cache import ShardCache
from trainer.inference import protocol
from trainer.inference.chat_model import ChatModel
from trainer.inference.choose import choose
from trainer.weights.open import open_weights

LATER = NOON + 86400
MODEL = ModelConfig(layers=1, heads=2, width=8, context=16, padded_vocab_size=64)
often = pytest.mark.parametrize("times", [60, pytest.param(20_000, marks=pytest.mark.slow)])


def every_seed(times: int, check: Callable[[random.Random], None]) -> None:
    """`check` with so many sources of random numbers. A failure names the seed."""

    @settings(max_examples=times, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32))
    def run(seed: int) -> None:
        check(random.Random(seed))

    run()


def snapshot(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@often
def test_manifests(tmp_path: Path, times: int):
    url = tmp_path / "set"
    url.mkdir()
    good = json.loads(GOOD.to_bytes())
    read = 0

    def check(chance: random.Random) -> None:
        nonlocal read
        (url / "manifest.json").write_bytes(hostile.mutated(good, chance))
        try:
            found = manifest.read(str(url))
            cache = ShardCache(str(url), found, "train", tmp_path / "cache", 1e9)
        except LauncherError:
            return
        read += 1
        for number, shard in enumerate(cache.shards):
            assert cache.path(number).resolve().is_relative_to(tmp_path / "cache")
            assert shard.bytes >= 1024
        cache.close()

    every_seed(times, check)
    assert read or times < 1000, "no mutation was harmless, so that nothing beyond the reader was tried"
    assert snapshot(tmp_path) == {url / "manifest.json"}


@often
def test_ledgers(tmp_path: Path, times: int):
    run = preempted_and_resumed(tmp_path / "run")
    good = {path: path.read_text() for path in sorted(snapshot(tmp_path))}

    def check(chance: random.Random) -> None:
        path = chance.choice(list(good))
        whole = good[path].splitlines()
        at = chance.randrange(len(whole)) if path.suffix == ".jsonl" else 0
        document = json.loads(whole[at] if path.suffix == ".jsonl" else good[path])
        data = hostile.mutated(document, chance)
        path.write_bytes(b"\n".join([*map(str.encode, whole[:at]), data, *map(str.encode, whole[at + 1 :])]) + b"\n")
        try:
            use(run.url, chance)
        finally:
            path.write_text(good[path])

    every_seed(times if times > 1000 else times // 2, check)
    assert snapshot(tmp_path) == set(good)


def use(url: str, chance: random.Random) -> None:
    """One of the ways in which a run is read, and one of the forms of its report."""
    if chance.random() < 0.3:
        other = chance.choice([lambda: read_run(url, Detail.ALL), lambda: spent_usd_at_most(url)])
        with contextlib.suppress(LauncherError):
            other()
    try:
        report = build(read_run(url), LATER)
    except LauncherError:
        return
    form = chance.choice(["screen", "html", "markdown", "json", "csv"])
    if form == "html":
        assert "<script" not in page.as_html(report, LATER)
        return
    screen = io.StringIO()
    console = Console(file=screen, width=150)
    others = {
        "screen": lambda: console.print(render.render(report)) or screen.getvalue(),
        "markdown": lambda: render.as_markdown(report) + render.markdown_table(compare.overview([report])),
        "json": lambda: render.as_json([report]),
        "csv": lambda: render.as_csv([report]),
    }
    text = others[form]()
    assert not set("\x1b\x07\x9b\u202e") & set(text)


@often
def test_listings(tmp_path: Path, times: int):
    url = "s3://b/runs/first"
    parts = [
        *hostile.NAMES,
        "run.json",
        "ledger",
        "checkpoints",
        "step-00000100",
        "COMPLETE",
        "segment-000001",
        "events",
    ]
    parts += ["start.jsonl", "00000000-00000003.jsonl", "00000009-00000001.jsonl", "segment-999999999999", "logs", "a"]

    def check(chance: random.Random) -> None:
        names = ["/".join(chance.choices(parts, k=chance.randint(1, 5))) for _ in range(8)]
        listing = [ObjectInfo(f"{url}/{name}", chance.choice([0, 7, 2**62])) for name in ["run.json", *names]]
        for info in runs.choose(url, listing):
            try:
                path = runs.local_path(info, url, str(tmp_path / "a/b"))
            except LauncherError:
                continue
            assert path.resolve().is_relative_to(tmp_path / "a/b")
        for info in listing:
            journal.sequence_numbers(info.uri)
        layout._by_step(f"{url}/checkpoints", listing)

    every_seed(times, check)
    assert snapshot(tmp_path) == set()


@often
def test_manifests_of_checkpoints(tmp_path: Path, times: int):
    url = checkpoints.store(str(tmp_path / "run"), checkpoints.random_model(MODEL))
    place = layout.folder_of(url, 1)
    name = storage.join(place, layout.manifest_name(1))
    good = json.loads(storage.read_bytes(name))
    before = snapshot(tmp_path)
    opened = 0

    def check(chance: random.Random) -> None:
        nonlocal opened
        data = hostile.mutated(good, chance)
        Path(name).write_bytes(data)
        marker = {"manifest": layout.manifest_name(1), "xxh3_128": layout.checksum(data)}
        marker_data = json.dumps(marker).encode() if chance.random() < 0.8 else hostile.mutated(marker, chance)
        Path(place, layout.MARKER).write_bytes(marker_data)
        try:
            open_weights(url, torch.device("cpu"))
            opened += 1
        except LauncherError:
            pass

    every_seed(times, check)
    assert opened or times < 1000, "no mutation was harmless"
    assert snapshot(tmp_path) == before


@often
def test_headers_of_payloads(times: int):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    good = {"__metadata__": {"format": "pt"}, "model.a[0:2]": entry, "model.b[0:1]": {**entry, "shape": [4]}}

    def check(chance: random.Random) -> None:
        text = hostile.mutated(good, chance)
        data = bytearray(len(text).to_bytes(8, "little") + text + b"\0" * 64)
        if chance.random() < 0.1:
            data[chance.randrange(8)] = chance.randrange(256)
        try:
            for key in blocks.tensors_of(np.frombuffer(data, np.uint8)):
                blocks.parse_key(key)
        except ValueError:
            pass

    every_seed(times, check)


@often
def test_descriptions_of_runs(tmp_path: Path, times: int):
    folder = RunFolder(str(tmp_path))
    settings_of_run = {"train.steps": 12, "model.layers": 2, "train.skip_steps": (1, 2)}
    open_run(folder, settings_of_run, {"train": {"steps": 12}}, "f" * 64)
    good = json.loads((tmp_path / "run.json").read_text())

    def check(chance: random.Random) -> None:
        (tmp_path / "run.json").write_bytes(hostile.mutated(good, chance))
        for use in (read_description, id_of, lambda run: open_run(run, settings_of_run, {}, "f" * 64)):
            try:
                use(folder)
            except RunError:
                continue

    every_seed(times, check)
    assert snapshot(tmp_path) == {tmp_path / "run.json"}


class Words:
    """An engine and its encoding that know words only."""

    context = 1024
    encoding = property(lambda self: self)

    def encode(self, text: str) -> list[int]:
        return [50256, *self.encode_ordinary(text)]

    def encode_ordinary(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


BODIES = (
    {"model": "m", "prompt": ["Once", [1, 2]], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 2},
    {"model": "m", "prompt": "a", "repetition_penalty": 1.1, "min_p": 0.1, "top_k": 3},
    {"model": "m", "prompt": "a", "stop": ["x", "y"], "logprobs": 3, "stream": True, "stream_options": {"a": True}},
    {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [],
    },
)


@often
def test_bodies_of_requests(times: int):
    model = ChatModel("m", Words(), True, 0.0)
    refusals: set[int] = set()

    def check(chance: random.Random) -> None:
        body = chance.choice(BODIES)
        try:
            document = untrusted.parse_json(hostile.mutated(body, chance))
        except ValueError:
            return
        try:
            found = protocol.read(document, model, "m", Sampling(), "messages" in body)
        except protocol.ApiError as error:
            refusals.add(error.status)
            json.dumps(error.body)
            return
        for request in found.requests:
            logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(chance.randrange(99)))
            assert 0 <= choose(logits, [request.sampling], [chance.random()], [range(8)])[0] < 8

    every_seed(times, check)
    assert refusals <= {400, 404}
