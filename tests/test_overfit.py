"""`--overfit`, which a newcomer runs first: the model memorizes a micro-batch; one that cannot learn fails."""

import dataclasses
import re

import pytest
import torch

from core import storage
from core.run import journal
from core.settings.training import PretrainConfig
from tests import corpus, launching, presets
from trainer.loop.overfit import is_overfitted
from trainer.model.gpt import GPT
from trainer.optim.optimizer import BlockOptimizer
from trainer.optim.schedule import rate_factor
from trainer.stages import sizing

PRESETS = presets.pretraining()
# Made small, the others are the first of these.
DIFFERENT = ("gpt2-124m", "gpt2-163m-untied", "gpt2-270m", "llama-416m", "speedrun-162m")


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    folder = tmp_path_factory.mktemp("data")
    source = corpus.write_parquet(folder / "source", [corpus.speeches(16)])
    corpus.prepare_set(source, str(folder / "set"), vocab_bpe)
    return str(folder / "set")


def endings(run_url: str) -> list[tuple[str, int]]:
    """(reason, step) of each segment."""
    found = []
    for segment in storage.list_names(storage.join(run_url, "ledger")):
        events, _ = journal.read(storage.join(run_url, "ledger", segment))
        found += [(event["reason"], event["step"]) for event in events if event["event"] == "end"]
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_repeats_one_micro_batch_at_a_constant_rate(name: str):
    settings, model = sizing.one_micro_batch(PRESETS[name], PRESETS[name].model, PRESETS[name].model.context)
    steps = settings.train.steps
    assert {rate_factor(step, steps, settings.optimizer) for step in (1, 2, steps // 2, steps - 1, steps)} == {1.0}
    assert settings.batch.tokens_per_step == settings.batch.micro_batch_size * model.context
    assert model.dropout == 0
    assert settings.train.eval_every == settings.train.hellaswag_every == settings.train.sample_every == 0
    assert (settings, model) == sizing.one_micro_batch(settings, model, model.context)


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_preset_learns_a_micro_batch_by_heart_with_its_own_optimizer(name: str):
    """Small, but with all its choices and rates, those of AdamW raised as small models need it."""
    settings, shape = sizing.one_micro_batch(PRESETS[name], PRESETS[name].model, PRESETS[name].model.context)
    model = GPT(dataclasses.replace(presets.small(shape), width=64, heads=2))
    model.initialise(1)
    rate = max(settings.optimizer.lr, 3e-3)
    optimizer = BlockOptimizer(model, dataclasses.replace(settings.optimizer, lr=rate), rank=0, world=1)
    tokens_BT = torch.randint(0, 64, (4, model.config.context + 1), generator=torch.Generator().manual_seed(1))
    for step in range(1, 301):
        model.zero_grad()
        loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        if is_overfitted(with_overfit(settings).train, float(loss.detach())):
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.grad_clip or float("inf"))
        optimizer.step(rate_factor(step, 300, settings.optimizer))
    raise AssertionError(f"the loss is {float(loss.detach())} after 300 steps")


def with_overfit(settings: PretrainConfig) -> PretrainConfig:
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, overfit=True))


def test_one_micro_batch_is_learned_by_heart_and_the_run_is_finished(data_url: str, tmp_path):
    """It stops at the bound, is killed and continues to the same bits, and ends alike on two ranks."""
    flags = [f"--data.url={data_url}", "--overfit", "--train.steps=400", "--train.log_every=50", "--optimizer.lr=3e-2"]
    run_url = f"{tmp_path}/learns"
    output = launching.train(1, *flags, f"--run.url={run_url}", "--checkpoint.every_steps=1000")
    losses = {step: found["loss"] for step, found in launching.metrics(run_url).items()}
    last = max(losses)
    assert losses[1] > 10
    assert losses[last] < 0.1 <= losses[last - 1]
    assert last < 400
    assert f"step {last}: the model has memorized the micro-batch" in output
    assert launching.completed(run_url)[0] == last
    assert endings(run_url) == [("finished", last)]
    assert sorted(launching.metrics(run_url, "eval")) == [last]

    again = launching.train(1, *flags, f"--run.url={run_url}")
    assert f"the run had already reached its last step, {last}" in again
    assert endings(run_url)[-1] == ("finished", last)
    assert max(launching.metrics(run_url)) == last

    killed = f"{tmp_path}/killed"
    process = launching.start(2, *flags, f"--run.url={killed}", "--checkpoint.every_steps=5")
    launching.wait_until(lambda: bool(launching.completed(killed)), process)
    launching.kill(process)
    launching.train(1, *flags, f"--run.url={killed}", "--checkpoint.every_steps=1000")
    assert {step: found["loss"] for step, found in launching.metrics(killed).items()} == losses
    assert launching.tensors(killed, last) == launching.tensors(run_url, last)


def test_a_model_that_does_not_learn_fails_each_time(data_url: str, tmp_path):
    flags = [f"--data.url={data_url}", f"--run.url={tmp_path}/learns-not", "--overfit", "--train.steps=5"]
    for _ in range(2):
        code, output = launching.finish(launching.start(1, *flags, "--optimizer.lr=1e-7"))
        assert code == 1
        assert re.search(
            r"error: step 5: with one micro-batch repeated the loss is 1\d\.\d+, not below train.overfit_max_loss",
            output,
        )


@pytest.mark.slow
def test_the_documented_first_command_succeeds(data_url: str, tmp_path):
    flags = [f"--data.url={data_url}", f"--run.url={tmp_path}/run", "--overfit"]
    code, output = launching.finish(launching.start(1, *flags, base=["trainer/configs/debug.yaml"]))
    assert code == 0, output
    assert max(launching.metrics(f"{tmp_path}/run")) < PRESETS["debug"].train.steps
    assert endings(f"{tmp_path}/run")[-1][0] == "finished"
