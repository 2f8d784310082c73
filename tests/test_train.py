"""The trainer as a whole: real torchrun processes, a real S3 server, real kills."""

import dataclasses
import re
import signal
import time

import pytest

from core import storage
from core.errors import ConfigError
from core.run.reader import read_run, spent_usd_at_most
from core.settings.training import BatchConfig
from tests import corpus, launching, patched
from tests.faulty_proxy import FaultyProxy
from trainer.checkpoint import layout
from trainer.stages import sizing


@pytest.fixture(scope="module")
def data_url(s3, tmp_path_factory, vocab_bpe) -> str:
    """A prepared token set in a bucket."""
    s3.make_bucket("train-data")
    source = corpus.write_parquet(tmp_path_factory.mktemp("source"), [corpus.speeches(16)])
    url = "s3://train-data/set"
    corpus.prepare_set(source, url, vocab_bpe)
    return url


@pytest.fixture(scope="module")
def straight(data_url: str) -> str:
    """A run on one rank that nothing interrupted."""
    run_url = data_url.replace("/set", "/straight")
    launching.train(
        1, f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=16", "--checkpoint.every_steps=100"
    )
    return run_url


def assert_equal_runs(run_url: str, other: str, step: int) -> None:
    assert launching.tensors(run_url, step) == launching.tensors(other, step)
    mine, theirs = launching.metrics(run_url), launching.metrics(other)
    assert sorted(mine) == sorted(theirs) == list(range(1, step + 1))
    for number in mine:
        assert (mine[number]["loss"], mine[number]["grad_norm"]) == (
            theirs[number]["loss"],
            theirs[number]["grad_norm"],
        )


def test_killed_and_resumed_on_other_ranks_equals_uninterrupted_to_the_bit(data_url: str, straight: str):
    """Four ranks, SIGKILL, then two ranks to the end: the bits of one rank that nothing stopped.

    The four ranks deal out the optimizer's state and the partial sums of gradients. tests/chaos.py kills more often."""
    run_url = straight.replace("straight", "killed")
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=16", "--checkpoint.every_steps=3"]
    process = launching.start(4, *flags, "--optimizer.zero=2")
    launching.wait_until(lambda: bool(launching.completed(run_url)), process)
    launching.kill(process)
    assert launching.completed(run_url)[0] < 16
    output = launching.train(2, *flags)
    assert "resumed from step" in output
    assert_equal_runs(run_url, straight, 16)
    assert launching.metrics(run_url, "eval")[16]["val_loss"] == launching.metrics(straight, "eval")[16]["val_loss"]


def test_sigterm_saves_and_leaves_and_the_rest_follows(data_url: str, straight: str, tmp_path):
    run_url = straight.replace("straight", "asked")
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=16", "--checkpoint.every_steps=100"]
    environment = {"EXIT_CODE_FILE": str(tmp_path / "code")}
    process = launching.start(2, *flags, environment=environment, constants=patched.PROMPT)
    launching.wait_until(lambda: bool(storage.list_names(storage.join(run_url, "metrics"))), process)
    process.send_signal(signal.SIGTERM)
    code, output = launching.finish(process)
    assert code != 0, "only a run that reached its last step may exit with 0"
    assert (tmp_path / "code").read_text() == "33\n"
    saved = launching.completed(run_url)
    assert len(saved) == 1, output
    output = launching.train(1, *flags)
    assert f"resumed from step {saved[0]}" in output
    assert_equal_runs(run_url, straight, 16)
    assert "the run had already reached its last step" in launching.train(1, *flags)


def test_a_store_that_fails_one_request_in_ten_changes_nothing(s3, data_url: str, straight: str, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.faulty_proxy.HANG_SECONDS", 0.1)
    run_url = straight.replace("straight", "flaky")
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=16", "--checkpoint.every_steps=4"]
    with FaultyProxy(s3.endpoint, share=0.1, seed=3) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.url, "DATA_CACHE_DIR": str(tmp_path / "cache")}
        process = launching.start(2, *flags, environment=environment, constants=patched.NO_PAUSES)
        code, output = launching.finish(process)
    assert code == 0, output
    assert sum(proxy.injected.values()) >= 5, proxy.injected
    assert "again in" in output
    assert_equal_runs(run_url, straight, 16)
    assert launching.completed(run_url)[0] == 16


def test_bad_input_is_one_sentence_and_changes_nothing(data_url: str, straight: str, tmp_path):
    before = storage.list_objects(straight)

    def refused(*flags: str) -> str:
        code, output = launching.finish(launching.start(1, *flags))
        assert code != 0
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, output
        assert "Traceback" not in output.split("error: ")[0]
        return lines[0]

    run = f"--run.url={straight}"
    data = f"--data.url={data_url}"
    assert "holds a run with optimizer.lr=0.01, this config has optimizer.lr=0.5" in refused(
        run, data, "--optimizer.lr=0.5", "--train.steps=16"
    )
    assert "there is no manifest; prepare the data first" in refused(run, f"--data.url={data_url}/absent")
    assert "bucket 'no-such-bucket' does not exist" in refused(run, "--data.url=s3://no-such-bucket/x")
    assert "model.padded_vocab_size is 1000, fewer than the 50257 tokens" in refused(
        run, data, "--model.padded_vocab_size=1000"
    )
    assert "unknown setting train.step; did you mean train.steps?" in refused(run, data, "--train.step=3")
    assert storage.list_objects(straight) == before


def test_a_loss_that_is_not_finite_stops_before_the_update(data_url: str):
    run_url = data_url.replace("/set", "/diverged")
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=16", "--checkpoint.every_steps=1"]
    wild = ["--optimizer.lr=1e30", "--optimizer.grad_clip=0", "--optimizer.warmup_steps=0"]
    code, output = launching.finish(launching.start(1, *flags, *wild))
    assert code != 0
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    found = re.match(r"error: step (\d+): the (loss on rank \d+|gradient norm) is (nan|inf|-inf)", line)
    assert found, line
    step = int(found.group(1))
    assert f"the weights were not changed. Start again to retry from step {step - 1}; if this happens again" in line
    # What it advises is accepted, and the next advice adds to it.
    assert f"leave its batch out with --train.skip_steps={step}, or" in line
    code, output = launching.finish(launching.start(1, *flags, *wild, f"--train.skip_steps={step}"))
    assert f"with --train.skip_steps={step},{step + 1}, or start a new run (another run.url) with" in output, output
    assert max(launching.metrics(run_url)) == step - 1
    assert launching.completed(run_url)[0] == step - 1


@pytest.mark.slow
def test_the_cap_stops_the_run_saved_and_a_larger_one_goes_on(data_url: str, tmp_path):
    """A dollar a second: 30 dollars are half a minute, of which three seconds are kept for the way down."""
    run_url = data_url.replace("/set", "/capped")
    flags = [
        f"--data.url={data_url}",
        f"--run.url={run_url}",
        "--train.steps=100000",
        "--run.shutdown_reserve_seconds=3",
    ]
    machine = {"USD_PER_HOUR": "3600", "EXIT_CODE_FILE": str(tmp_path / "code")}
    reached = []
    for limit in ("30", "30", "60"):
        code, output = launching.finish(launching.start(1, *flags, environment={**machine, "MAX_USD": limit}))
        assert code != 0
        assert (tmp_path / "code").read_text() == "34\n", output
        assert "stopped by the cap at step" in output
        reached.append((launching.completed(run_url) or [0])[0])
        assert spent_usd_at_most(run_url) < float(limit) or reached[-1] == reached[-2]
    assert 0 < reached[0] == reached[1] < reached[2]
    code, output = launching.finish(launching.start(1, *flags, environment={"MAX_USD": "60"}))
    assert code != 0
    assert "run.max_usd is 60, but this machine's price is not known; set USD_PER_HOUR" in output


def test_a_finished_run_is_finished_even_if_another_machine_has_spent_the_cap(data_url: str):
    """SkyPilot replaces a machine that it loses before it has heard of the job's end."""
    run_url = data_url.replace("/set", "/over")
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=2", "--run.max_usd=5"]
    code, output = launching.finish(launching.start(1, *flags, environment={"USD_PER_HOUR": "0.01"}))
    assert code == 0, output
    dear = {"USD_PER_HOUR": "3600", "SEGMENT_STARTED_AT": str(time.time() - 60)}
    code, output = launching.finish(launching.start(1, *flags, environment=dear))
    assert code == 0, output
    assert [segment.end["reason"] for segment in read_run(run_url).segments] == ["finished", "finished"]
    code, output = launching.finish(launching.start(1, *flags, "--extend", "--train.steps=4", environment=dear))
    assert code != 0
    assert "stopped by the cap at step 2 of 4" in output


def test_batch_that_does_not_divide_over_the_ranks(data_url: str, straight: str):
    code, output = launching.finish(
        launching.start(3, f"--data.url={data_url}", f"--run.url={straight}", "--train.steps=16")
    )
    assert code != 0
    assert (
        "makes 4 micro-batches of 1 x 32 tokens, which do not divide over 3 ranks; start 2 ranks, or 4: the" in output
    )
    assert "the batch of a run that has begun is fixed" in output


@pytest.mark.slow
def test_the_batch_that_a_new_run_is_advised_to_take_is_accepted(data_url: str):
    run_url = data_url.replace("/set", "/three")
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=2", "--train.sample_tokens=0"]
    code, output = launching.finish(launching.start(3, *flags))
    assert code != 0
    [advised] = re.findall(r"start 2 ranks, or 4, or set (batch\.tokens_per_step=96)\n", output)
    launching.train(3, *flags, f"--{advised}")


@pytest.mark.parametrize(
    ("tokens", "size", "world", "advice"),
    [
        (768, 8, 2, "makes 3 micro-batches of 8 x 32 tokens, which do not divide over 2 ranks; start 1 rank, or 3, or "
         "set batch.micro_batch_size=6"),
        (256, 8, 2, "makes 1 micro-batch of 8 x 32 tokens, which do not divide over 2 ranks; start 1 rank, or set "
         "batch.micro_batch_size=4"),
        (96, 1, 2, "start 1 rank, or 3, or set batch.tokens_per_step=128"),
    ],
)  # fmt: skip
def test_advice_on_a_batch_divides(tokens: int, size: int, world: int, advice: str):
    batch = BatchConfig(tokens_per_step=tokens, micro_batch_size=size)
    with pytest.raises(ConfigError, match=f"{re.escape(advice)}$"):
        sizing.accumulation(batch, 32, world)
    key, value = re.search(r"batch\.(\w+)=(\d+)$", advice).groups()
    assert sizing.accumulation(dataclasses.replace(batch, **{key: int(value)}), 32, world) >= 1


def test_a_finished_run_is_extended_as_the_message_says(data_url: str, straight: str):
    run_url = straight.replace("straight", "extended")
    for info in storage.list_objects(straight):
        storage.write_bytes(info.uri.replace(straight, run_url, 1), storage.read_bytes(info.uri))
    longer = ["--train.steps=18", "--train.sample_tokens=0"]
    flags = [f"--data.url={data_url}", *longer]
    code, output = launching.finish(launching.start(1, *flags, f"--run.url={run_url}"))
    assert code != 0
    assert "holds a run with train.steps=16, this config has train.steps=18; use the settings it was started" in output
    [(extend, branch, other)] = re.findall(r"more steps: (\S+); to go on .*: (--from=\S+) --run.url=(\S+)\n", output)
    # A branch leaves the run as it is, with its own schedule over 18 steps.
    assert "resumed from step 16" in launching.train(1, *flags, branch, f"--run.url={other}")
    assert sorted(launching.metrics(other)) == [17, 18]
    assert launching.tensors(other, 16) == launching.tensors(run_url, 16)
    # The extended run warms up again, and goes on without the flag too.
    output = launching.train(1, *flags, extend, f"--run.url={run_url}")
    assert "the run is extended from 16 to 18 steps, after step 16" in output
    rates = [metric["lr"] for _, metric in sorted(launching.metrics(run_url).items())]
    assert rates[15] < rates[16]
    assert set(launching.completed(run_url)) == {16, 17, 18}, "the last stable step and the old end are kept"
    assert "the run had already reached its last step" in launching.train(1, *flags, f"--run.url={run_url}")


def test_damaged_checkpoints_are_skipped_by_name_and_never_replaced_by_a_fresh_start(data_url: str, straight: str):
    run_url = straight.replace("straight", "damaged")
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=8", "--checkpoint.every_steps=2"]
    launching.train(1, *flags)
    assert launching.completed(run_url) == [8, 6]
    newest = storage.join(layout.folder_of(run_url, 8), launching.manifest(run_url, 8).files[0].name)
    data = bytearray(storage.read_bytes(newest))
    data[len(data) // 2] ^= 1
    storage.write_bytes(newest, bytes(data))
    output = launching.train(1, *flags)
    assert "checkpoint step-00000008 skipped" in output
    assert "checksum differs" in output
    assert "resumed from step 6" in output
    for step in (8, 6):
        storage.delete(storage.join(layout.folder_of(run_url, step), launching.manifest(run_url, step).files[0].name))
    code, output = launching.finish(launching.start(1, *flags))
    assert code != 0
    assert "none of the 2 complete checkpoints can be used" in output, output
