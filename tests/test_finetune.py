"""Fine-tuning: it learns, resumes to the bit on other ranks, and packs examples without cross-talk."""

import numpy as np
import pytest
import torch

from core import storage
from core.data.chat_template import NO_TARGET, render
from core.data.vocabulary import read as read_vocabulary
from core.errors import CheckpointError, DataError
from core.settings.model import ModelConfig
from core.settings.tuning import ExamplesConfig
from tests import launching, tuning
from trainer.checkpoint import layout
from trainer.data import examples
from trainer.data.examples import NumberedBatches, in_order, pack
from trainer.model import lora
from trainer.model.gpt import GPT
from trainer.stages.finetune import Rows
from trainer.weights import open as weights

MODULE = "trainer.train"
FLAGS = [*tuning.BATCH, *tuning.QUIET, "--train.steps=18", "--train.eval_every=0", "--checkpoint.every_steps=3"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return tuning.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tuning.conversations(300))


@pytest.fixture(scope="module")
def encoding(vocab_bpe):
    return read_vocabulary(str(vocab_bpe)).encoding()


def flags_of(base: tuple[str, str], rows: str, run_url: str, *more: str) -> list[str]:
    return [
        "--stage=finetune",
        f"--start.weights={base[1]}",
        f"--data.examples={rows}",
        f"--run.url={run_url}",
        *FLAGS,
        *more,
    ]


def assert_learned(run_url: str, least: float) -> None:
    found = launching.metrics(run_url, "eval")
    assert found[0]["val_loss"] - found[18]["val_loss"] > least


@pytest.fixture(scope="module")
def straight(pretrained, rows, tmp_path_factory) -> tuple[str, str]:
    """A run of all weights that nothing interrupted, and its output."""
    run_url = str(tmp_path_factory.mktemp("straight") / "run")
    return run_url, tuning.run_alone(MODULE, *flags_of(pretrained, rows, run_url))


def test_all_weights_learn(straight):
    run_url, output = straight
    assert "0 longer than 64 tokens" in output
    assert "### Assistant:" in output, "samples are taken in the template"
    assert_learned(run_url, 2.0)
    state = launching.manifest(run_url, 18).state
    assert (state["template"], state["stage"]) == ("headed-turns", "finetune")
    assert state["start"].endswith("/base/checkpoints/step-00000030")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(pretrained, rows, straight, tmp_path, ranks: int):
    killed = str(tmp_path / "killed")
    flags = flags_of(pretrained, rows, killed)
    if ranks == 1:
        process = tuning.start_alone(MODULE, *flags)
    else:
        process = launching.start(ranks, *flags, module=MODULE, base=())
    tuning.kill_after(process, killed, 6)
    assert launching.completed(killed)[0] < 18
    assert "resumed from step" in tuning.run_alone(MODULE, *flags)
    assert launching.tensors(killed, 18) == launching.tensors(straight[0], 18)
    assert launching.metrics(killed, "eval")[18]["val_loss"] == launching.metrics(straight[0], "eval")[18]["val_loss"]
    assert tuning.stage_in_report(killed) == ("finetune", 2)


@pytest.mark.slow
def test_adapters_train_alone_resume_and_open_as_a_plain_model(pretrained, rows, tmp_path):
    straight, killed = str(tmp_path / "straight"), str(tmp_path / "killed")
    adapters = ["--lora.rank=4", "--optimizer.lr=3e-2"]
    output = tuning.run_alone(MODULE, *flags_of(pretrained, rows, straight, *adapters))
    assert "of which 4,096 train" in output
    assert_learned(straight, 0.5)
    process = tuning.start_alone(MODULE, *flags_of(pretrained, rows, killed, *adapters))
    tuning.kill_after(process, killed, 6)
    tuning.run_alone(MODULE, *flags_of(pretrained, rows, killed, *adapters))
    stored = launching.tensors(killed, 18)
    assert stored == launching.tensors(straight, 18)
    assert all("lora_" in key for key in stored)
    assert sum(map(len, stored.values())) == 3 * 4096 * 4, "weights and two moments of the adapters alone"

    opened = weights.open_weights(straight, CPU)
    start = weights.open_weights(pretrained[1], CPU)
    assert {name for name, _ in opened.model.named_parameters()} == {name for name, _ in start.model.named_parameters()}
    tokens = torch.arange(100, 120)[None]
    adapted = weights.open_weights(pretrained[1], CPU).model
    lora.attach(adapted, **launching.manifest(straight, 18).state["lora"])
    weights._fill(lora.adapters(adapted), straight, launching.manifest(straight, 18))
    with torch.no_grad():
        torch.testing.assert_close(opened.model(tokens), adapted(tokens))
        assert (opened.model(tokens) - start.model(tokens)).abs().max() > 0.1
    assert opened.encoding.encode_ordinary("hello")

    # Other weights in the place of those that the adapters belong to.
    folder = layout.folder_of(pretrained[1], 30)
    (file,) = [info for info in storage.list_objects(folder) if info.name.endswith(".safetensors")]
    content = storage.read_bytes(file.uri)
    try:
        state = launching.manifest(straight, 18).state
        moved = {**state, "start_digest": "0" * 32}
        with pytest.raises(CheckpointError, match="its adapters belong to weights with the checksum 000"):
            weights._check_base(start.model, moved, straight)
        storage.write_bytes(file.uri, content[:-1])
        line = tuning.refused(MODULE, *flags_of(pretrained, rows, killed, *adapters))
        assert "bytes, its manifest says" in line
    finally:
        storage.write_bytes(file.uri, content)


def test_a_merged_adapter_is_the_adapter():
    model = GPT(ModelConfig(layers=2, heads=2, width=16, context=16, padded_vocab_size=128))
    model.initialise(1)
    tokens = torch.arange(12)[None]
    before = model(tokens).detach()
    lora.attach(model, 3, 6.0, ["attn.c_attn", "mlp.c_proj"])
    lora.initialise(model, 1)
    assert torch.equal(model(tokens), before), "the first step starts from the model as it was"
    with torch.no_grad():
        for parameter in lora.adapters(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    adapted = model(tokens).detach()
    lora.merge(model)
    torch.testing.assert_close(model(tokens), adapted)
    assert not lora.adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_packed_examples_do_not_see_each_other(encoding, position: str):
    """Logits of an example in a packed row are those of the example alone; gradients do not cross."""
    rendered = [
        render(
            [{"role": "user", "content": f"Number {number}?"}, {"role": "assistant", "content": "Yes " * number}],
            encoding,
        )
        for number in (1, 2, 3)
    ]
    texts = examples.Texts.of([(np.array(each.tokens), np.array(each.targets)) for each in rendered])
    rows = Rows(texts, 64)
    assert len(rows) == 1
    tokens, targets = rows.tensors(np.array([0]), CPU)
    model = GPT(ModelConfig(layers=2, heads=2, width=16, context=64, padded_vocab_size=50304, position=position))
    model.initialise(1)
    packed = model(tokens, packed=True)
    place, count = 0, 0
    for index in sorted(range(3), key=lambda index: -len(rendered[index].tokens)):
        alone = torch.tensor([rendered[index].tokens])
        end = place + alone.shape[1]
        assert torch.equal(tokens[:, place:end], alone)
        torch.testing.assert_close(packed[:, place:end], model(alone), rtol=1e-5, atol=1e-6)
        count += int((targets[:, place:end] != NO_TARGET).sum())
        place = end
    assert count == (targets != NO_TARGET).sum() == rows.answers[0], "padding has no targets"

    seen = []
    handle = model.wte.register_forward_hook(lambda _, __, output: seen.append(output) or output.retain_grad())
    loss = model(tokens, packed=True)[0, : len(rendered[2].tokens)].square().sum()
    loss.backward()
    handle.remove()
    touched = seen[0].grad[0].abs().sum(1) > 0
    assert touched[: len(rendered[2].tokens)].all()
    assert not touched[len(rendered[2].tokens) :].any()


def test_rows_are_filled_completely_and_no_further():
    lengths = np.random.default_rng(1).integers(1, 65, 500).tolist()
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    assert len(rows) <= 1.05 * sum(lengths) / 64


def test_batches_are_the_same_for_any_ranks_and_from_any_step():
    def taken(world: int, first_step: int) -> list[list[int]]:
        ranks = [
            NumberedBatches(10, 7, first_step, 8, 2, rank, world, lambda _, mine: mine.tolist())
            for rank in range(world)
        ]
        return [
            [item for batches in ranks for _ in range(4 // world) for item in next(batches)]
            for _ in range(first_step, 6)
        ]

    assert taken(1, 0) == taken(2, 0) == taken(4, 0)
    assert taken(2, 3) == taken(1, 0)[3:]
    flat = [item for step in taken(1, 0) for item in step]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)), "every example once per epoch"
    assert flat[:10] != flat[10:20]
    assert in_order(np.array([13]), 10, 7).tolist() == [flat[13]]


def read(tmp_path, encoding, rows: list, **settings) -> examples.Examples:
    config = ExamplesConfig(url="", examples=tuning.write_rows(tmp_path / "rows.jsonl", rows), **settings)
    return examples.read_conversations(config, encoding, 32)


def test_bad_rows_are_counted_cut_and_refused(tmp_path, encoding):
    good = tuning.conversations(50)
    long_answer = {"instruction": "Why?", "output": "because " * 100}
    long_question = {"instruction": "why " * 100, "output": "Because."}
    found = read(tmp_path, encoding, [*good, long_answer, long_question], val_fraction=0.0)
    assert "2 longer than 32 tokens and cut at their end, 1 of them skipped" in found.report
    assert len(found.train) == 51
    assert max(found.train.lengths) == 32
    whole = render([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "because " * 100}], encoding)
    assert found.train.tokens[-32:].tolist() == whole.tokens[:32]
    unanswered = {"instruction": "Why?", "output": ""}
    with pytest.raises(DataError, match="1 of 51 rows cannot be used, such as row 51 has an empty message"):
        read(tmp_path, encoding, [*good, unanswered])
    tolerated = read(tmp_path, encoding, [*good, unanswered, "text"], max_bad_fraction=0.1)
    assert "2 without an answer or of an unknown form skipped" in tolerated.report
    with pytest.raises(DataError, match="none of its 1 rows is left to train on"):
        read(tmp_path, encoding, [long_question])


def test_the_split_goes_by_question(tmp_path, encoding):
    rows = [{"instruction": f"Question {i % 100}?", "output": f"Answer {i}."} for i in range(400)]
    found = read(tmp_path, encoding, rows, val_fraction=0.3)
    sides = [
        {encoding.decode(part.tolist()).split("### Assistant")[0] for part in np.split(side.tokens, side.starts[1:-1])}
        for side in (found.train, found.val)
    ]
    assert not sides[0] & sides[1]
    assert 15 <= len(sides[1]) <= 45


def test_bad_input_is_one_sentence(pretrained, rows, tmp_path):
    run_url = str(tmp_path / "run")

    def refused(*more: str) -> str:
        return tuning.refused(MODULE, *flags_of(pretrained, rows, run_url, *more))

    assert "start.weights: is empty" in refused("--start.weights=")
    assert "has no complete checkpoint" in refused(f"--start.weights={tmp_path}/absent")
    assert "data.length is 128, but" in refused("--data.length=128")
    assert "there is no set 'absent'; store it first" in refused("--data.examples=absent")
    assert "optimizer.name: is muon, which does not fit adapters" in refused("--lora.rank=2", "--optimizer.name=muon")
    assert not storage.list_objects(run_url)
