"""Scores: against lm-evaluation-harness itself, on one and two ranks, after an end in the middle; and their cost."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from core import storage
from core.data import manifest, sets
from core.errors import CheckpointError, ConfigError, DataError, TrainingError
from core.run.reader import read_run
from core.settings import loader
from core.settings.evaluation import EvaluateConfig
from costs import discover
from costs.report import build
from tests import launching, models
from trainer import evaluate, export
from trainer.evals import contamination, likelihood, perplexity, suite
from trainer.evals.hellaswag import HellaSwag
from trainer.evals.likelihood import ScoringRequest, likelihoods
from trainer.model.gpt import GPT
from trainer.weights.open import open_weights

REPOSITORY = Path(__file__).parent.parent
CPU = torch.device("cpu")
ITEMS = 20
TOKENS = 3300  # of validation: a whole document and a piece of the next
PLANTED = models.hellaswag_items(ITEMS)[5]


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    """Its training text holds item 5 of the HellaSwag set, in the middle of a document."""
    ending = PLANTED["endings"][PLANTED["label"]]
    story = f"Once upon a time. {PLANTED['ctx_a']} {PLANTED['ctx_b'].capitalize()} {ending} The end of it. " * 3
    return models.prepare_data(tmp_path_factory.mktemp("data"), vocab_bpe, ITEMS, tuple([story] * 12))


@pytest.fixture(scope="module")
def run_url(tmp_path_factory, data_url) -> str:
    url = str(tmp_path_factory.mktemp("runs") / "small")
    models.make_run(url, data_url)
    return url


@pytest.fixture
def fresh(run_url: str, tmp_path: Path) -> str:
    """A copy of the run without any evaluation."""
    shutil.copytree(Path(run_url) / "checkpoints", tmp_path / "run" / "checkpoints")
    return str(tmp_path / "run")


def evaluated(url: str, *flags: str, ranks) -> dict[str, dict]:
    """The newest results by task."""
    settings = loader.load(EvaluateConfig, ["--cpu_threads=1", *flags], {})
    evaluate.run([url], settings, ranks)
    found = suite.read_results(suite.results_folder(open_weights(url, CPU), settings.results))
    return {document["task"]: document for document in found}


# --- against the harness -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness_tasks(tmp_path_factory, data_url, vocab_bpe) -> Iterator[Path]:
    """The harness's own hellaswag, its wikitext, a last-word task and a generating one, on local files."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install lm-eval")
    folder = tmp_path_factory.mktemp("tasks")
    own = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    shutil.copy(own / "utils.py", folder)
    rows = folder / "hellaswag.jsonl"
    rows.write_bytes(storage.read_bytes(storage.join(data_url, "sets", "hellaswag.jsonl")))
    task = (own / "hellaswag.yaml").read_text()
    task = task.replace("task: hellaswag", "task: local_hellaswag").replace("training_split: train\n", "")
    files = "dataset_kwargs:\n  data_files:\n    validation: {}"
    task = task.replace("dataset_path: Rowan/hellaswag", f"dataset_path: json\n{files.format(rows)}")
    (folder / "local_hellaswag.yaml").write_text(task)
    encoding = _encoding(data_url)
    tokens = perplexity.read_tokens(data_url, manifest.read(data_url), TOKENS)
    pages = [encoding.decode(document.tolist()) for document in perplexity.split_documents(tokens)]
    (folder / "pages.jsonl").write_text("".join(json.dumps({"page": page, "word": "the"}) + "\n" for page in pages))
    common = f"dataset_path: json\n{files.format(folder / 'pages.jsonl')}\nvalidation_split: validation\n"
    (folder / "rolling.py").write_text(
        "import re\n"
        "def process_results(doc, results):\n"
        "    words, size = len(re.split(r'\\s+', doc['page'])), len(doc['page'].encode())\n"
        "    return {'word_perplexity': (results[0], words), 'byte_perplexity': (results[0], size),\n"
        "            'bits_per_byte': (results[0], size)}\n"
    )
    metrics = "".join(f"  - metric: {name}\n" for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"))
    (folder / "local_pages.yaml").write_text(
        f"task: local_pages\n{common}output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        f"process_results: !function rolling.process_results\nmetric_list:\n{metrics}"
    )
    (folder / "local_word.yaml").write_text(
        f"task: local_word\n{common}output_type: loglikelihood\ndoc_to_text: '{{{{page[:40]}}}}'\n"
        "doc_to_target: ' {{word}}'\nmetric_list:\n  - metric: perplexity\n  - metric: acc\n"
    )
    (folder / "local_write.yaml").write_text(
        f"task: local_write\n{common}output_type: generate_until\ndoc_to_text: '{{{{page[:40]}}}}'\n"
        "doc_to_target: '{{word}}'\ngeneration_kwargs:\n  until: [' ']\n  max_gen_toks: 8\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        # It starts compilers and pip, to tell their versions.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield folder


@pytest.fixture(scope="module")
def by_the_harness(run_url, harness_tasks, tmp_path_factory) -> dict:
    """Scores of the exported model by the harness's own model class."""
    pytest.importorskip("transformers", reason="needs the extra `hub`: pip install transformers")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    out = tmp_path_factory.mktemp("exported") / "model"
    export.main([run_url, str(out)])
    found = simple_evaluate(
        HFLM(pretrained=str(out), tokenizer=str(out), device="cpu", batch_size=8),
        tasks=["local_hellaswag", "local_pages", "local_word", "local_write"],
        task_manager=TaskManager(include_path=str(harness_tasks), include_defaults=False),
        bootstrap_iters=1000,
    )
    return found


def test_hellaswag_equals_the_harness(fresh, by_the_harness, ranks):
    ours = evaluated(fresh, "--tasks=hellaswag", ranks=ranks)["hellaswag"]["scores"]
    theirs = by_the_harness["results"]["local_hellaswag"]
    assert ours["items"] == ITEMS
    assert 0 < ours["accuracy"] < 1
    assert ours["accuracy"] == pytest.approx(theirs["acc,none"], abs=1e-4)
    assert ours["accuracy_norm"] == pytest.approx(theirs["acc_norm,none"], abs=1e-4)
    assert ours["accuracy_stderr"] == pytest.approx(theirs["acc_stderr,none"], abs=1e-4)
    assert ours["accuracy_norm_stderr"] == pytest.approx(theirs["acc_norm_stderr,none"], abs=1e-4)


def test_each_ending_is_as_likely_as_the_harness_says(run_url, data_url, by_the_harness, ranks):
    opened = open_weights(run_url, CPU)
    scorer = HellaSwag(sets.read(data_url, "hellaswag"), opened.encoding, ranks)
    ours = [each.total for each in likelihoods(opened.model, scorer._requests, ranks)]
    samples = sorted(by_the_harness["samples"]["local_hellaswag"], key=lambda sample: sample["doc_id"])
    theirs = [float(response[0][0]) for sample in samples for response in sample["resps"]]
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-5)


def test_perplexity_of_documents_equals_the_harness(fresh, by_the_harness, ranks):
    ours = evaluated(fresh, "--tasks=perplexity", "--per_document", f"--tokens={TOKENS}", ranks=ranks)[
        "perplexity-rolling"
    ]["scores"]
    theirs = by_the_harness["results"]["local_pages"]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ours[name] == pytest.approx(theirs[f"{name},none"], rel=1e-4)


def test_any_task_of_the_harness_runs_on_our_interface(fresh, harness_tasks, by_the_harness, ranks):
    names = ("local_hellaswag", "local_pages", "local_word", "local_write")
    tasks = f"--tasks={','.join(f'lm-eval:{name}' for name in names)}"
    ours = evaluated(fresh, tasks, f"--lm_eval_tasks={harness_tasks}", ranks=ranks)
    for name in names:
        theirs = {
            metric: value for metric, value in by_the_harness["results"][name].items() if metric.endswith(",none")
        }
        assert theirs
        for metric, value in theirs.items():
            if "perplexity_stderr" not in metric and not isinstance(value, str):  # drawn at random
                mine = ours[f"lm-eval:{name}"]["scores"][metric.removesuffix(",none")]
                assert mine == pytest.approx(value, rel=1e-4, abs=1e-4), (name, metric)


@pytest.mark.slow  # the harness indexes all its tasks
def test_a_task_that_the_harness_does_not_have(fresh, ranks):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install lm-eval")
    with pytest.raises(ConfigError, match="lm-eval:no_such: unknown task of the harness"):
        evaluated(fresh, "--tasks=lm-eval:no_such", ranks=ranks)


def test_windows_that_roll_are_the_harness_s():
    utils = pytest.importorskip("lm_eval.utils", reason="needs the extra `eval`: pip install lm-eval")
    for length in (1, 2, 7, 8, 9, 16, 23):
        document = np.arange(100, 100 + length)
        windows = utils.get_rolling_token_windows(document.tolist(), 50256, max_seq_len=8, context_len=1)
        theirs = [utils.make_disjoint_window(window) for window in windows]
        ours = [(list(context), list(rest)) for context, rest in perplexity.rolling(document, 8)]
        assert ours == theirs


def test_the_style_of_llm_c_is_build_nanogpts(run_url, data_url, ranks):
    """hellaswag.py of build-nanogpt, in its own words: losses of the ending's tokens, their sum and their mean."""
    opened = open_weights(run_url, CPU)
    items = sets.read(data_url, "hellaswag")
    expected = []
    for item in items:
        context = opened.encoding.encode_ordinary(item["ctx"])
        sums, means = [], []
        for ending in item["endings"]:
            end = opened.encoding.encode_ordinary(" " + ending)
            with torch.no_grad():
                logits = opened.model(torch.tensor([context + end]))[0, :-1, :50257]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor((context + end)[1:]), reduction="none")
            sums.append(losses[len(context) - 1 :].sum().item())
            means.append(losses[len(context) - 1 :].mean().item())
        expected.append((int(np.argmin(sums)) == item["label"], int(np.argmin(means)) == item["label"]))
    answers = HellaSwag(items, opened.encoding, ranks, style="llm.c").answers(opened.model)
    assert list(zip(answers.right, answers.right_norm, strict=True)) == expected
    assert answers != HellaSwag(items, opened.encoding, ranks).answers(opened.model)


# --- definitions ---------------------------------------------------------------------------------------------------


def test_perplexity_and_bits_per_byte_by_hand(fresh, data_url, ranks):
    found = evaluated(fresh, "--tasks=perplexity", "--tokens=1000", ranks=ranks)["perplexity"]["scores"]
    opened = open_weights(fresh, CPU)
    tokens = perplexity.read_tokens(data_url, manifest.read(data_url), 1000).astype(np.int64)
    total = 0.0
    for first in range(0, 999, 64):
        window = torch.from_numpy(tokens[first : first + 65])
        with torch.no_grad():
            logits = opened.model(window[None, :-1])[0, :, :50257]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    text = b"".join(opened.encoding.decode_tokens_bytes([int(token) for token in tokens[1:] if token != 50256]))
    assert found["tokens"] == 999
    assert found["bytes"] == len(text)
    assert found["loss"] == pytest.approx(total / 999, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(total / 999), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / np.log(2) / len(text), rel=1e-5)


def test_padding_of_the_vocabulary_has_no_share(run_url, ranks):
    opened = open_weights(run_url, CPU)
    request = [ScoringRequest([1, 2], [3, 4])]
    [before] = likelihoods(opened.model, request, ranks)
    with torch.no_grad():
        opened.model.wte.weight[50257:] = 100 * opened.model.wte.weight[3]
    [after] = likelihoods(opened.model, request, ranks)
    assert before == after


def test_numbers_that_are_not_finite_are_an_error(run_url, ranks):
    opened = open_weights(run_url, CPU)
    with torch.no_grad():
        opened.model.ln_f.weight[0] = torch.inf
    with pytest.raises(TrainingError, match=r"request 0 of 1 has a log-likelihood of (nan|-inf|inf)"):
        likelihoods(opened.model, [ScoringRequest([1], [2])], ranks)


# --- contamination -------------------------------------------------------------------------------------------------


def test_hashes_are_equal_exactly_where_tokens_are():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 3, 3000)  # few kinds, so that runs repeat
    for run in (2, 3, 7, 8, 13):
        found = contamination.hashes(tokens, run)
        runs = [tuple(tokens[start : start + run]) for start in range(len(tokens) - run + 1)]
        assert len(found) == len(runs)
        assert len(set(found.tolist())) == len(set(runs))
        assert len(set(zip(found.tolist(), runs, strict=True))) == len(set(runs))
    assert len(contamination.hashes(tokens[:5], 6)) == 0


def test_items_that_stand_in_the_training_text_are_found(fresh, data_url, ranks, monkeypatch):
    monkeypatch.setattr(contamination, "CHUNK_TOKENS", 100)  # runs lie across pieces
    found = evaluated(fresh, "--tasks=hellaswag", "--contamination", ranks=ranks)["hellaswag"]
    scores = found["scores"]
    assert (scores["items"], scores["seen_items"], scores["unseen_items"]) == (ITEMS, 1, ITEMS - 1)
    right = [bit == "1" for bit in found["answers"]["right_norm"]]
    without = [bit for number, bit in enumerate(right) if number != 5]
    assert scores["accuracy_norm"] == sum(right) / ITEMS
    assert scores["unseen_accuracy_norm"] == sum(without) / (ITEMS - 1)
    [kept] = [name for name in storage.list_names(f"{fresh}/evaluations") if name.startswith("contamination-")]
    assert json.loads((Path(fresh) / "evaluations" / kept).read_text())["seen"] == [5]


# --- results, resuming, ranks, cost --------------------------------------------------------------------------------


def test_one_and_two_ranks_give_the_same_scores(fresh, tmp_path):
    found = {}
    for count in (1, 2):
        url = str(tmp_path / f"ranks-{count}")
        shutil.copytree(Path(fresh) / "checkpoints", Path(url) / "checkpoints")
        flags = [url, "--cpu_threads=1", "--contamination", "--per_document", "--tokens=1500"]
        process = launching.start(count, *flags, module="trainer.evaluate", base=(), environment={"USD_PER_HOUR": "36"})
        code, output = launching.finish(process)
        assert code == 0, output
        documents = suite.read_results(f"{url}/evaluations/step-00000000")
        found[count] = [(each["task"], each["scores"], each.get("answers")) for each in documents]
        assert {each["ranks"] for each in documents} == {count}
        assert "accuracy_norm" in output
    assert len(found[1]) == 2
    assert found[1] == found[2]
    # What it cost is a stage of its own, beside the run's.
    run = read_run(f"{url}/evaluations")
    report = build(run, run.segments[0].ended_at)
    assert (report.stage, report.state) == ("evaluate", "finished")
    assert {line.name for line in report.by["stage"]} == {"evaluate"}
    [line] = [line for line in report.phases if line.name == "eval"]
    assert line.usd > 0
    assert f"{url}/evaluations" in discover.find_runs(str(tmp_path))


def test_a_result_is_kept_and_never_overwritten(fresh, ranks, caplog, capsys):
    caplog.set_level("INFO")
    first = evaluated(fresh, "--tasks=hellaswag", ranks=ranks)["hellaswag"]
    assert "before" not in caplog.text
    assert evaluated(fresh, "--tasks=hellaswag", ranks=ranks)["hellaswag"] == first
    assert "hellaswag was measured before (--rerun repeats it)" in caplog.text
    stored = {
        info.uri: storage.read_bytes(info.uri) for info in storage.list_objects(f"{fresh}/evaluations/step-00000000")
    }
    again = evaluated(fresh, "--tasks=hellaswag", "--rerun", ranks=ranks)["hellaswag"]
    assert again["time"] > first["time"]
    assert again["scores"] == first["scores"]
    other = evaluated(fresh, "--tasks=hellaswag", "--limit=10", ranks=ranks)
    assert [name for name in storage.list_names(f"{fresh}/evaluations/step-00000000") if name.endswith("-2.json")]
    assert other["hellaswag"]["scores"]["items"] in (10, ITEMS)
    now = {
        info.uri: storage.read_bytes(info.uri) for info in storage.list_objects(f"{fresh}/evaluations/step-00000000")
    }
    assert len(now) == len(stored) + 2
    assert stored.items() <= now.items()
    assert "± " in capsys.readouterr().out


def test_what_was_cut_off_goes_on(fresh, ranks, monkeypatch):
    whole = evaluated(fresh, "--tasks=perplexity,hellaswag", "--tokens=3000", ranks=ranks)
    shutil.rmtree(f"{fresh}/evaluations")
    monkeypatch.setattr(likelihood, "TOKENS_PER_BATCH", 512)
    compute = likelihood._scores
    batches = []

    def counted(*arguments):
        batches.append(len(arguments[1]))
        if len(batches) == 8:
            raise TrainingError("the machine is gone")
        return compute(*arguments)

    monkeypatch.setattr(likelihood, "_scores", counted)
    with pytest.raises(TrainingError, match="the machine is gone"):
        evaluated(fresh, "--tasks=perplexity,hellaswag", "--tokens=3000", ranks=ranks)
    assert read_run(f"{fresh}/evaluations").segments[-1].end["reason"] == "failed"
    rest = evaluated(fresh, "--tasks=perplexity,hellaswag", "--tokens=3000", ranks=ranks)
    requests = 4 * ITEMS + -(-(whole["perplexity"]["scores"]["tokens"]) // 64)
    assert sum(batches) - batches[7] == requests, "nothing is computed twice but what was cut off"
    assert rest["hellaswag"]["answers"] == whole["hellaswag"]["answers"]
    assert rest["perplexity"]["scores"] == pytest.approx(whole["perplexity"]["scores"])
    assert not [info for info in storage.list_objects(fresh) if "/partial/" in info.uri]


def test_runs_and_public_models_side_by_side(fresh, run_url, ranks, capsys):
    export.main([run_url, f"{fresh}-hf/public"])
    capsys.readouterr()
    flags = ("--tasks=hellaswag", f"--compare={fresh}-hf/public,{fresh}/checkpoints/step-00000000")
    settings = loader.load(EvaluateConfig, ["--cpu_threads=1", *flags], {})
    evaluate.run([fresh, *settings.compare], settings, ranks)
    printed = capsys.readouterr().out
    assert "run step 0" in printed
    assert "public" in printed
    own = suite.read_results(f"{fresh}/evaluations/step-00000000")
    [name] = [name for name in storage.list_names(f"{fresh}/evaluations") if name.endswith("public")]
    public = suite.read_results(f"{fresh}/evaluations/{name}")
    assert own[0]["scores"] == public[0]["scores"]


def test_without_hellaswag_the_rest_is_measured(fresh, data_url, ranks, tmp_path, caplog):
    shutil.copytree(data_url, tmp_path / "bare", ignore=shutil.ignore_patterns("sets"))
    with caplog.at_level("WARNING"):
        found = evaluated(fresh, "--tokens=2000", f"--data_url={tmp_path / 'bare'}", ranks=ranks)
    assert set(found) == {"perplexity"}
    said = f"hellaswag is left out: {tmp_path}/bare/sets/hellaswag.json: there is no set 'hellaswag'; store it first: "
    assert f"{said}python -m data_prep.sets hellaswag {tmp_path}/bare" in caplog.text


def test_what_cannot_be_measured_is_one_sentence(fresh, run_url, data_url, ranks, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'helaswag' is not a task; choose from perplexity, hellaswag, lm-eval:NAME"):
        loader.load(EvaluateConfig, ["--tasks=helaswag"], {})
    with pytest.raises(CheckpointError, match="absent: has no complete checkpoint"):
        evaluated(str(tmp_path / "absent"), ranks=ranks)
    export.main([run_url, str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"no data: the first model is not a run with a data\.url"):
        evaluated(str(tmp_path / "out"), f"--results={tmp_path / 'r'}", ranks=ranks)
    shutil.copytree(data_url, tmp_path / "cut")
    shard = next((tmp_path / "cut" / "val").iterdir())
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"but its header promises"):
        evaluated(fresh, "--tasks=perplexity", f"--data_url={tmp_path / 'cut'}", ranks=ranks)
    (tmp_path / "cut" / "sets" / "hellaswag.json").unlink()
    with pytest.raises(DataError, match=r"there is no set 'hellaswag'; store it first"):
        evaluated(fresh, "--tasks=hellaswag", f"--data_url={tmp_path / 'cut'}", ranks=ranks)
    monkeypatch.delenv("RUN_URL", raising=False)
    with pytest.raises(ConfigError, match="no model given"):
        evaluate.main(["--tasks=hellaswag"])


def test_vocabulary_of_a_damaged_model_is_not_guessed(run_url, tmp_path, data_url, monkeypatch):
    shutil.copytree(run_url, tmp_path / "run")
    for file in (tmp_path / "run").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="checksum differs from its manifest's"):
        open_weights(str(tmp_path / "run"), CPU)


def _encoding(data_url: str):
    from core.data.vocabulary import FILE_NAME, read

    return read(storage.join(data_url, FILE_NAME)).encoding()


def test_greedy_is_told(ranks):
    torch.manual_seed(0)
    model: GPT = models.random_model(models.SMALL)
    with torch.no_grad():
        best = int(model(torch.tensor([[1, 2]]))[0, -1, :50257].argmax())
    found = likelihoods(model, [ScoringRequest([1, 2], [best]), ScoringRequest([1, 2], [(best + 1) % 50257])], ranks)
    assert [each.greedy for each in found] == [True, False]
    assert found[0].total > found[1].total
