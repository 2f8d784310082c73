"""Options, seeds and turns of lm-evaluation-harness's generating tasks on our models."""

import dataclasses
import json
from importlib.util import find_spec

import pytest
import torch

from core.data import chat_template
from core.errors import ConfigError
from core.settings.evaluation import EvaluateConfig
from tests import models
from tests.later import Later
from trainer.distributed.process_group import Ranks
from trainer.evals.progress import PartialResults
from trainer.weights.open import open_weights

pytestmark = pytest.mark.skipif(not find_spec("lm_eval"), reason="needs the extra `eval`: pip install lm-eval")
instance, utils = Later("lm_eval.api.instance"), Later("lm_eval.models.utils")
harness = Later("trainer.evals.harness")
CPU = torch.device("cpu")
SAMPLED = {"until": ["\n\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}


@pytest.fixture(scope="module")
def opened(tmp_path_factory, vocab_bpe):
    data_url = models.prepare_data(tmp_path_factory.mktemp("data"), vocab_bpe)
    url = str(tmp_path_factory.mktemp("runs") / "small")
    models.make_run(url, data_url)
    return open_weights(url, CPU)


def requests_of(repeats: int, **options) -> list:
    """As the harness hands them in: the same request `repeats` times."""
    each = [
        instance.Instance("generate_until", {}, ("Once upon", SAMPLED | options), 0, ("task", number, repeats))
        for number in range(3)
    ]
    return [request for request in each for _ in range(repeats)]


def answers(opened, ranks: Ranks, requests) -> list[str]:
    return harness.HarnessModel(opened, ranks, "fp32", None, False).generate_until(requests)


def test_repeats_differ_and_do_not_depend_on_the_ranks(opened, ranks, monkeypatch):
    requests = requests_of(8)
    found = answers(opened, ranks, requests)
    for number in range(3):
        assert len(set(found[8 * number : 8 * number + 8])) > 4
    assert len(set(harness.seeds_of(requests))) == 24
    assert answers(opened, ranks, requests_of(8)) == found
    parts: list[dict[int, str]] = []

    def gather(mine, _):
        parts.append(mine)
        return [{number: "" for number in range(24)}, mine]

    monkeypatch.setattr("trainer.evals.harness.gather_objects", gather)
    for rank in range(3):
        answers(opened, dataclasses.replace(ranks, rank=rank, world=3), requests)
    together = {number: text for part in parts for number, text in part.items()}
    assert [together[number] for number in range(24)] == found


def test_repeats_of_a_greedy_task_are_equal(opened, ranks):
    assert len(set(answers(opened, ranks, requests_of(4, do_sample=False)))) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_gen_toks": 5},
        {"max_new_tokens": 5},
        {"max_tokens": 5},
        {"max_completion_tokens": 5},
        {"temperature": 0.7},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.0},
        {"until": "x"},
        {},
    ],
)
def test_options_mean_what_they_mean_to_the_harness(options):
    theirs, ours = utils.normalize_gen_kwargs(options), harness.sampling_of(options, 3, "lm-eval:t")
    assert ours.max_tokens == theirs["max_gen_toks"]
    assert ours.temperature == theirs.get("temperature", 0.0)
    assert list(ours.stop) == theirs["until"]


def test_options_of_sampling_reach_it():
    more = {"top_k": 1, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "num_beams": 1, "use_cache": True}
    found = harness.sampling_of(SAMPLED | more, 3, "lm-eval:t")
    assert (found.top_k, found.top_p, found.min_p, found.repetition_penalty, found.seed) == (1, 0.9, 0.1, 1.2, 3)
    assert harness.sampling_of({"do_sample": True}, 3, "t").temperature == 1.0
    assert harness.sampling_of(SAMPLED | {"top_k": -1}, 3, "t").top_k == 0
    assert harness.sampling_of(SAMPLED | {"until": ["", "zzz"]}, 3, "t").stop == ("zzz",)
    assert harness.sampling_of(SAMPLED | {"until": None}, 3, "t").stop == ()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_beams": 4}, "lm-eval:t: generation_kwargs has num_beams=4, which is not supported; use until"),
        ({"max_length": 40}, "has max_length=40"),
        ({"top_p": 2.0}, "top_p: is 2.0, must be"),
        ({"repetition_penalty": "much"}, "lm-eval:t: generation_kwargs cannot be used: could not convert"),
        ({"temperature": "hot"}, "cannot be used: could not convert"),
        ({"max_gen_toks": 0}, "max_tokens: is 0, must be"),
    ],
)
def test_options_without_a_meaning_are_refused(options, problem):
    with pytest.raises(ConfigError, match=problem):
        harness.sampling_of(SAMPLED | options, 0, "lm-eval:t")


def test_a_tuned_model_can_be_asked_in_its_turns(opened, ranks, tmp_path, monkeypatch, caplog):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "Who is it?", "a": "x"}) + "\n")
    (tmp_path / "turns.yaml").write_text(
        f"task: turns\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'rows.jsonl'}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs:\n  until: ['zzz']\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n"
    )
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # slow: it asks compilers and pip
    asked = []
    whole = harness.HarnessModel._prompt
    monkeypatch.setattr(
        harness.HarnessModel, "_prompt", lambda self, *more: asked.append(whole(self, *more)) or asked[-1]
    )

    def run(state, in_turns: bool) -> None:
        settings = EvaluateConfig(lm_eval_tasks=str(tmp_path), apply_chat_template=in_turns)
        with PartialResults(str(tmp_path / "partial"), ranks, lambda: None) as partial:
            harness.run(
                "turns", dataclasses.replace(opened, state={**opened.state, **state}), ranks, "fp32", partial, settings
            )

    tuned = {chat_template.STATE_KEY: chat_template.NAME}
    run(tuned, True)
    messages = [{"role": "user", "content": "Who is it?"}]
    expected = chat_template.render(messages, opened.encoding, add_generation_prompt=True).tokens
    assert asked[-1].tokens == expected
    assert set(chat_template.STOP) < set(asked[-1].sampling.stop)
    run(tuned, False)
    assert opened.encoding.decode(asked[-1].tokens) == "Who is it?"
    assert "was fine-tuned with a chat template, which these prompts lack; --apply_chat_template=true" in caplog.text
    with pytest.raises(ConfigError, match=r"apply_chat_template: .*small.* is a base model without a chat template"):
        run({}, True)
