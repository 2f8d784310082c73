"""Preference optimisation: its loss is the published one, it learns, and it resumes to the bit."""

import math

import numpy as np
import pytest
import torch

from core import storage
from core.data.chat_template import NO_TARGET, render
from core.data.sets import preference
from core.data.vocabulary import read as read_vocabulary
from core.errors import DataError
from core.settings.model import ModelConfig
from core.settings.tuning import ExamplesConfig
from tests import launching, tuning
from trainer.data import examples
from trainer.model.gpt import GPT
from trainer.stages.dpo import answer_log_probs, margins, preference_losses

MODULE = "trainer.train"
FLAGS = [*tuning.BATCH, *tuning.QUIET, "--optimizer.lr=3e-3", "--train.steps=18", "--train.eval_every=0"]
FLAGS += ["--checkpoint.every_steps=3", "--data.val_fraction=0.1"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return tuning.write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", tuning.preferences(200))


def flags_of(base: tuple[str, str], pairs: str, run_url: str, *more: str) -> list[str]:
    return [
        "--stage=dpo",
        f"--start.weights={base[1]}",
        f"--data.examples={pairs}",
        f"--run.url={run_url}",
        *FLAGS,
        *more,
    ]


@pytest.fixture(scope="module")
def straight(pretrained, pairs, tmp_path_factory) -> str:
    """A run that nothing interrupted."""
    run_url = str(tmp_path_factory.mktemp("dpo") / "straight")
    tuning.run_alone(MODULE, *flags_of(pretrained, pairs, run_url))
    return run_url


def test_it_learns(straight):
    found = launching.metrics(straight, "eval")
    assert found[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-5), "nothing is preferred to the reference yet"
    assert abs(found[0]["val_reward_margin"]) < 1e-4
    assert found[18]["val_loss"] < 0.5
    assert found[18]["val_reward_accuracy"] > 0.95
    assert found[18]["val_reward_margin"] > 0.5
    assert tuning.stage_in_report(straight) == ("dpo", 1)


@pytest.mark.slow
def test_killed_it_resumes_to_the_bit(pretrained, pairs, straight, tmp_path):
    killed = str(tmp_path / "killed")
    process = tuning.start_alone(MODULE, *flags_of(pretrained, pairs, killed))
    tuning.kill_after(process, killed, 6)
    assert launching.completed(killed)[0] < 18
    output = tuning.run_alone(MODULE, *flags_of(pretrained, pairs, killed))
    assert "resumed from step" in output
    assert "the reference, are computed once" not in output
    assert launching.tensors(killed, 18) == launching.tensors(straight, 18)
    found = [launching.metrics(url, "eval")[18] | {"time": 0} for url in (killed, straight)]
    assert found[0] == found[1]
    assert tuning.stage_in_report(killed) == ("dpo", 2)


@pytest.mark.slow
def test_ranks_and_adapters(pretrained, pairs, tmp_path):
    """Two ranks give the bits of one; adapters learn too."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    adapters = ["--lora.rank=4", "--optimizer.lr=3e-2"]
    tuning.run_alone(MODULE, *flags_of(pretrained, pairs, alone, *adapters))
    process = launching.start(2, *flags_of(pretrained, pairs, together, *adapters), module=MODULE, base=())
    code, output = launching.finish(process)
    assert code == 0, output
    assert launching.tensors(alone, 18) == launching.tensors(together, 18)
    references = {storage.read_bytes(f"{url}/reference.safetensors") for url in (alone, together)}
    assert len(references) == 1
    found = [launching.metrics(url, "eval")[18] | {"time": 0} for url in (alone, together)]
    assert found[0] == found[1]
    assert found[0]["val_reward_accuracy"] > 0.9


def reference_loss(policy: np.ndarray, reference: np.ndarray, beta: float, smoothing: float) -> np.ndarray:
    """As TRL's DPOTrainer.dpo_loss with loss_type "sigmoid" writes it, in float64."""
    pi_logratios = policy[:, 0] - policy[:, 1]
    ref_logratios = reference[:, 0] - reference[:, 1]
    logits = pi_logratios - ref_logratios

    def logsigmoid(x: np.ndarray) -> np.ndarray:
        return -np.logaddexp(0, -x)

    return -logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_the_loss_is_the_reference_implementations(beta: float, smoothing: float):
    random = np.random.default_rng(3)
    policy, reference = random.normal(-40, 15, (2, 64, 2))
    tensors = torch.tensor(policy, requires_grad=True), torch.tensor(reference)
    losses = preference_losses(margins(*tensors, beta), smoothing)
    np.testing.assert_allclose(losses.detach().numpy(), reference_loss(policy, reference, beta, smoothing), rtol=1e-12)
    losses.sum().backward()
    # Rafailov et al. 2023, section 4: the gradient weighs a pair by beta sigmoid(-margin).
    margin = beta * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    wrong = 1 / (1 + np.exp(margin))
    np.testing.assert_allclose(tensors[0].grad[:, 0].numpy(), -beta * (wrong - smoothing), rtol=1e-9, atol=1e-12)


def test_log_probabilities_and_their_gradients_are_those_of_whole_logits():
    model = GPT(ModelConfig(layers=1, heads=2, width=16, context=32, padded_vocab_size=50304, logit_softcap=20.0))
    model.initialise(1)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50000, (12, 32), generator=generator)
    targets = torch.randint(0, 50000, (12, 32), generator=generator)
    targets[:, :5] = NO_TARGET
    targets[3, 20:] = NO_TARGET
    found = answer_log_probs(model, tokens, targets)
    found.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    whole = model(tokens).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    plain = torch.where(targets >= 0, whole, 0.0).sum(1)
    torch.testing.assert_close(found, plain)
    plain.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-2)


def test_only_the_last_answer_counts(tmp_path, vocab_bpe):
    encoding = read_vocabulary(str(vocab_bpe)).encoding()
    before = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello you"},
        {"role": "user", "content": "How are you?"},
    ]
    row = {"prompt": before, "chosen": "Very well", "rejected": "Go away now"}
    config = ExamplesConfig(examples=tuning.write_rows(tmp_path / "rows.jsonl", [row]), val_fraction=0.0)
    texts = examples.read_preferences(config, encoding, 64).train
    assert len(texts) == 2
    for index, answer in enumerate(("Very well", "Go away now")):
        targets = texts.targets[texts.starts[index] : texts.starts[index + 1]]
        assert encoding.decode(targets[targets != NO_TARGET].tolist()[:-1]) == answer
    whole = render([*before, {"role": "assistant", "content": "Very well"}], encoding)
    assert texts.tokens[: texts.starts[1]].tolist() == whole.tokens


def test_forms_of_pairs():
    chosen = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    rejected = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]}
    rows = [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": chosen["messages"], "rejected": rejected["messages"]},
    ]
    assert [preference(row) for row in rows] == [(chosen, rejected)] * 3
    for row, problem in (
        ({"prompt": "Q", "chosen": "A"}, "has no `rejected`"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "the same answer twice"),
        ({"chosen": chosen["messages"], "rejected": [{"role": "user", "content": "Q"}]}, "end with assistant"),
        (["Q"], "not a JSON object"),
    ):
        with pytest.raises(ValueError, match=problem):
            preference(row)


def pair(*before: tuple[str, str]) -> tuple[dict, dict]:
    turns = [{"role": role, "content": content} for role, content in before]
    return tuple({"messages": [*turns, {"role": "assistant", "content": answer}]} for answer in ("A is", "B is"))


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A is"), ("assistant", "B is")))
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
ANSWERS = {"chosen": "A is", "rejected": "B is"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Q", "chosen": GOOD, "rejected": BAD},
        WHOLE,
        {"prompt": [USER], **WHOLE},
        {"prompt": " Q\n", "messages": [USER, GOOD], "score_chosen": 8.0, **WHOLE},
        {"question": "Q", **ANSWERS},
        {"instruction": "Q", "input": "", **ANSWERS},
        {"chosen": "Q A is", "rejected": "Q B is"},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A is", "rejected": "\n\nHuman: Q\n\nAssistant: B is"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}], **ANSWERS},
    ],
)
def test_every_form_of_trl_is_the_same_pair(row):
    assert preference(row) == pair(("user", "Q"))
    system = {"role": "system", "content": "Be kind."}
    for whole in preference(row | {"system": "Be kind."}):
        assert whole["messages"][0] == system


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Other", **WHOLE}, "has a prompt that does not occur in `chosen`"),
        ({"prompt": "Q", "completion": "A", "label": True}, "has no `chosen`; `completion` with `label` is not a pair"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": [{"name": "f"}]}, "has tools"),
        ({"query": "Q", "chosen": "The A", "rejected": "The B"}, "if one of query holds it, rename that column"),
        ({"prompt": "", "chosen": "The A", "rejected": "The B"}, "if one of prompt holds it"),
        ({"chosen": "A", "rejected": "B"}, "do not begin alike"),
        ({"prompt": [USER], "chosen": [GOOD | {"tool_calls": [{}]}], "rejected": [BAD]}, "tool_calls"),
        ({"prompt": "Q", "chosen": [GOOD | {"weight": 0}], "rejected": [BAD]}, "message of weight 0"),
        ({"system": "S", "prompt": [{"role": "system", "content": "T"}, USER], **ANSWERS}, "another message of role"),
        ({"prompt": "Q", "chosen": 1, "rejected": 2}, "whose content is int"),
    ],
)
def test_what_no_pair_can_express_is_refused(row, problem):
    with pytest.raises(ValueError, match=problem):
        preference(row)


def test_columns_that_are_not_used_are_counted(tmp_path, vocab_bpe):
    row = {
        "prompt": "Q",
        "prompt_id": "x",
        "messages": [USER, GOOD],
        "score_chosen": 8.0,
        "system": "Be kind.",
        **WHOLE,
    }
    config = ExamplesConfig(examples=tuning.write_rows(tmp_path / "rows.jsonl", [row, row]), val_fraction=0.0)
    found = examples.read_preferences(config, read_vocabulary(str(vocab_bpe)).encoding(), 64)
    assert found.report.endswith("not used: messages in 2 rows, prompt_id in 2 rows, score_chosen in 2 rows")


def test_bad_input_is_one_sentence(pretrained, pairs, tmp_path):
    run_url = str(tmp_path / "run")

    def refused(*more: str) -> str:
        return tuning.refused(MODULE, *flags_of(pretrained, pairs, run_url, *more))

    assert "batch.micro_batch_size: is 1, must be even" in refused("--batch.micro_batch_size=1")
    assert "dpo.label_smoothing: is 0.5, must be at least 0 and below 0.5" in refused("--dpo.label_smoothing=0.5")
    rows = tuning.write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": ""}])
    assert "1 of 1 rows cannot be used, such as row 1 has an empty message" in refused(f"--data.examples={rows}")
    assert not storage.list_objects(run_url)


def test_pairs_that_differ_only_beyond_the_cut_are_left_out(tmp_path, vocab_bpe):
    encoding = read_vocabulary(str(vocab_bpe)).encoding()
    row = {"prompt": "Q", "chosen": "same " * 50 + "good", "rejected": "same " * 50 + "bad"}
    config = ExamplesConfig(examples=tuning.write_rows(tmp_path / "rows.jsonl", [row]), val_fraction=0.0)
    with pytest.raises(DataError, match="1 lost their answer to a cut after 32 tokens"):
        examples.read_preferences(config, encoding, 32)
