"""`make run`: the stages of a budget one after the other, what it takes up again, its caps, its end, and bad input."""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clouds import providers
from core.data import manifest
from core.errors import ConfigError, DataError, LauncherError, RunError
from core.run import budget as budgets
from core.run import course
from core.run.folder import RunFolder
from launch import drive, outcome, plan, run
from tests import corpus
from tests.golden import GoldenRun
from tests.rare import fast_only
from tests.rented import STEPS, Machines, planned, rent

STORE_REPORT = outcome._store_report


@pytest.fixture
def machines(tmp_path: Path, sky, monkeypatch, vocab_bpe) -> Machines:
    found = Machines(tmp_path / "bucket", vocab_bpe)
    rent(found, sky, monkeypatch)
    return found


def folder_of(machines: Machines, name: str = "20usd") -> RunFolder:
    return RunFolder(str(machines.bucket / "runs" / name))


# --- the stages --------------------------------------------------------------------------------------------------


def test_a_sum_becomes_a_model_in_four_launches_under_one_cap(machines, capsys):
    assert run.main(["--usd=20"]) == 0
    best = planned()["plans"][0]
    parts, whole = best["parts"], best["machines_usd"]
    assert [path for path, _, _ in machines.launches] == [
        "sky/prep-data.yaml",
        best["machine"]["task"],
        "sky/evaluate.yaml",
        "sky/export.yaml",
    ]
    prepared, trained, evaluated, _ = (settings for _, _, settings in machines.launches)
    # A preparation's key may be limited to the run's folder, and its tokens are those of the plan.
    assert prepared["RUN"] == "20usd/preparation"
    million = -(-best["tokens"] * 20 / best["usd_spent"] // 1e6)  # what all of the money would buy
    assert prepared["DATA"] == f"fineweb-edu-{million:.0f}m" == trained["DATA"]
    assert f"--data.train_tokens={million * 1e6:.0f} " in prepared["PREP_ARGS"]
    assert machines.launches[1][1] == ["--infra", "lambda"] or "--gpus" in machines.launches[1][1]
    assert trained["CONFIG"] == best["config"]
    *model, steps = best["flags"]
    assert steps == f"--train.steps={best['steps']}"
    wanted = [*model, f"--train.steps={2 * best['steps']}", "--optimizer.schedule=wsd"]
    assert trained["TRAIN_ARGS"].split() == wanted, "the money ends it, and decides when the rates fall"
    assert evaluated["EVAL_ARGS"] == "--tasks=perplexity"  # HellaSwag is not stored beside these tokens
    # The machines cost a cent a second: 10 s and 600 s, the evaluation 20 s, the export 5 s.
    later = parts["evaluation"] + parts["export"]
    caps = [0.25, whole - later, whole - 6.10 - parts["export"], whole - 6.30]
    assert machines.caps() == pytest.approx(caps, abs=0.011)
    said = capsys.readouterr().out
    assert "spent on machines: $6.35 (preparation 0.10, training 6.00, evaluation 0.20, export 0.05)" in said
    assert f"left of $20.00: ${whole - 6.35:.2f}, and" in said
    assert "validation loss on fineweb-edu-" in said
    folder = folder_of(machines)
    found = budgets.outcome(folder, 1)
    assert found["val_loss"] == 3.25
    assert found["forecast"]["loss"] == best["loss"]
    assert found["usd"] == pytest.approx(6.35)
    assert [each["step"] for each in found["in_run"]] == [*range(1, STEPS + 1)]
    assert found["in_run"][-1] == {"step": STEPS, "val_loss": 3.3, "error": 0.02, "end": STEPS, "usd": 6.1}
    assert f"at step {STEPS // 2} of {STEPS} the run itself expected 3.3000 ± 0.020" in said
    STORE_REPORT(folder)
    assert (Path(folder.url) / "report.html").exists()


def test_the_same_command_after_the_end_launches_nothing(machines, capsys):
    assert run.main(["--usd=20"]) == 0
    first = budgets.outcome(folder_of(machines), 1)
    count = len(machines.launches)
    capsys.readouterr()
    assert run.main(["--usd=20"]) == 0
    assert len(machines.launches) == count
    assert "spent on machines: $6.35" in capsys.readouterr().out
    assert budgets.outcome(folder_of(machines), 1) == first


def test_a_plan_of_today_does_not_change_a_run_of_yesterday(machines, monkeypatch):
    machines.trainings = ["failed"]
    with pytest.raises(RunError):
        run.main(["--usd=20"])
    before = machines.launches[1][2]
    monkeypatch.setattr(plan, "ask", lambda arguments: pytest.fail("the plan is in the bucket"))
    machines.trainings = ["finished"]
    assert run.main(["--usd=20"]) == 0
    again = machines.launches[2][2]
    assert [path for path, _, _ in machines.launches].count("sky/prep-data.yaml") == 1
    assert {key: again[key] for key in ("RUN", "DATA", "CONFIG", "TRAIN_ARGS", "MAX_USD")} == {
        key: before[key] for key in ("RUN", "DATA", "CONFIG", "TRAIN_ARGS", "MAX_USD")
    }


def test_a_machine_that_is_taken_away_is_replaced_within_the_same_cap(machines):
    machines.trainings = ["gone", "gone", "finished"]
    assert run.main(["--usd=20"]) == 0
    training = [settings for path, _, settings in machines.launches if "pretrain" in path]
    assert len(training) == 3
    assert len({settings["MAX_USD"] for settings in training}) == 1
    assert len(budgets.launches(folder_of(machines), 1)) == 6


def test_a_training_that_its_cap_ends_is_evaluated_and_the_end_says_so(machines, capsys):
    machines.trainings = ["cap"]
    assert run.main(["--usd=20"]) == 0
    assert [path for path, _, _ in machines.launches[-2:]] == ["sky/evaluate.yaml", "sky/export.yaml"]
    assert "the cap ended the training before its last step" in capsys.readouterr().out


def test_a_failure_is_not_repeated_and_its_cause_is_said(machines):
    machines.trainings = ["failed", "finished"]
    with pytest.raises(RunError, match=r"the training has ended \(failed: it broke\); see `make logs FROM=bucket"):
        run.main(["--usd=20"])
    assert len(machines.launches) == 2


def test_launches_that_get_a_stage_no_further_come_to_an_end(machines):
    machines.trainings = [None] * 9
    with pytest.raises(RunError, match="3 launches of the training got it no further than 0 steps"):
        run.main(["--usd=20"])
    assert machines.trainings == [None] * 6


def test_money_that_is_gone_leaves_out_what_is_not_needed_and_the_command_fails(machines, capsys):
    machines.usd_per_hour = 36.0 * 3.19  # 600 s of training cost $19.14 of the $19.19 for machines
    machines.trainings = ["cap"]
    assert run.main(["--usd=20"]) == 1
    assert "sky/evaluate.yaml" not in [path for path, _, _ in machines.launches]
    said = capsys.readouterr()
    assert "evaluation: left out, $0.0" in said.out
    assert "spent on machines: $" in said.out
    assert "without its evaluation and export; the same command tries again" in said.err


def test_a_failed_evaluation_does_not_keep_the_model_from_its_export(machines, capsys):
    machines.evaluation = "failed"
    assert run.main(["--usd=20"]) == 1
    assert machines.launches[-1][0] == "sky/export.yaml"
    assert "the evaluation has ended (failed: it broke)" in capsys.readouterr().err
    machines.evaluation = "finished"
    assert run.main(["--usd=20"]) == 0
    assert [path for path, _, _ in machines.launches[-2:]] == ["sky/export.yaml", "sky/evaluate.yaml"]


# --- where a stage runs ------------------------------------------------------------------------------------------


def cluster(run_name: str) -> list:
    """As SkyPilot 0.14.1 records it: the file's own variables, and the command that replaced them."""
    words = ["sky", "launch", "--env", "TRAIN_ARGS=--a=1 --b=2", "--env", f"RUN={run_name}", "sky/pretrain-8xa100.yaml"]
    record = {"last_creation_yaml": "envs: {RUN: gpt2-124m}\n", "last_creation_command": shlex.join(words)}
    return [json.dumps([{"name": "pretrain-8xa100", "status": "UP", **record}]), "", 0]


def test_ctrl_c_leaves_the_machine_and_the_same_command_follows_it_again(machines, sky, monkeypatch, capsys):
    real, nothing = machines.submit, ["[]", "", 0]

    def submit(path: str, options: list[str], settings: dict[str, str]) -> int:
        if "pretrain" in path:
            machines.launches.append((path, options, settings))
            sky(**{"status": cluster("20usd")})
            return 0
        return real(path, options, settings)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drive, "submit", submit)
    monkeypatch.setattr(drive, "pause", interrupt)
    assert run.main(["--usd=20"]) == 130
    assert "training goes on without this command; the same command follows it again" in capsys.readouterr().out
    count = len(machines.launches)

    def finishes() -> None:
        sky(**{"status": nothing})
        machines._train(machines.launches[count - 1][2])

    monkeypatch.setattr(drive, "pause", finishes)
    assert run.main(["--usd=20"]) == 0
    assert [path for path, _, _ in machines.launches[count:]] == ["sky/evaluate.yaml", "sky/export.yaml"]
    assert "training: cluster pretrain-8xa100 UP, 0 steps, $0.10 of $20.00" in capsys.readouterr().out


def test_the_cluster_of_another_run_is_not_taken(machines, sky):
    sky(**{"status": [["[]", "", 0], cluster("other")]})
    with pytest.raises(RunError, match="cluster pretrain-8xa100 works for RUN=other; wait until it has ended"):
        run.main(["--usd=20"])
    assert [path for path, _, _ in machines.launches] == ["sky/prep-data.yaml"]


def test_a_managed_job_counts_from_the_launch_that_is_in_the_bucket(machines, sky, monkeypatch):
    best = planned()["plans"][0]
    spot = best | {"machine": best["machine"] | {"task": "sky/pretrain-8xa100-spot.yaml", "options": []}}
    monkeypatch.setattr(plan, "ask", lambda arguments: planned() | {"plans": [spot]})
    job = {"job_id": 3, "job_name": "pretrain-8xa100-spot", "status": "RUNNING"}
    old = [json.dumps([job | {"submitted_at": 1000.0}]), "", 0]
    ours = [json.dumps([job | {"job_id": 4, "submitted_at": time.time() + 60}, job | {"submitted_at": 1000.0}]), "", 0]
    sky(**{"status": ["[]", "", 0], "jobs queue": [ours, old]})
    seen: list[int] = []
    monkeypatch.setattr(drive, "pause", lambda: seen.append(len(machines.launches)))
    machines.trainings = ["preempted", "finished"]
    assert run.main(["--usd=20"]) == 0
    assert [path for path, _, _ in machines.launches].count("sky/pretrain-8xa100-spot.yaml") == 2
    assert seen == [2]  # it waited for job 4, and not for the older one


def test_what_a_user_has_ended_is_not_launched_again(machines, sky, monkeypatch):
    machines.trainings = ["preempted", "finished"]
    with pytest.raises(RunError, match="the training was asked to stop, so it is not launched again"):
        run.main(["--usd=20"])
    best = planned()["plans"][0]
    spot = best | {"machine": best["machine"] | {"task": "sky/pretrain-8xa100-spot.yaml", "options": []}}
    monkeypatch.setattr(plan, "ask", lambda arguments: planned() | {"plans": [spot]})
    job = {"job_id": 4, "job_name": "pretrain-8xa100-spot", "submitted_at": time.time() + 60, "status": "CANCELLED"}
    sky(**{"status": ["[]", "", 0], "jobs queue": [json.dumps([job]), "", 0]})
    machines.trainings = ["preempted", "finished"]
    monkeypatch.setenv("RUN", "second")
    with pytest.raises(RunError, match="the training was asked to stop, so it is not launched again"):
        run.main(["--usd=20"])
    assert machines.trainings == ["finished"]


# --- tokens and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["", "trainer/configs/debug.yaml"])
def test_tokens_that_are_there_are_not_prepared_again(machines, monkeypatch, vocab_bpe, config):
    source = corpus.write_parquet(machines.bucket / "source", [corpus.documents(60)])
    corpus.prepare_set(source, str(machines.bucket / "data/mine"), vocab_bpe)
    asked: list[list[str]] = []

    def ask(arguments: list[str]) -> dict:
        asked.append(list(arguments))
        return planned()

    monkeypatch.setattr(plan, "ask", ask)
    monkeypatch.setenv("DATA", "mine")
    monkeypatch.setenv("CONFIG", config)
    assert run.main(["--usd=20"]) == 0
    tokens = manifest.read(str(machines.bucket / "data/mine")).splits["train"].tokens
    # An own config may be smaller than all models of a plan, and few tokens may do for it.
    assert asked == [["--usd=20", "--prepared", *([] if config else [f"--unique-tokens={tokens}"])]]
    assert [path for path, _, _ in machines.launches] == [
        "sky/pretrain-8xa100.yaml", "sky/evaluate.yaml", "sky/export.yaml"
    ]  # fmt: skip
    assert machines.launches[0][2]["DATA"] == "mine"


def test_an_own_config_takes_the_place_of_the_plan_s_model(machines, monkeypatch):
    monkeypatch.setenv("CONFIG", "trainer/configs/debug.yaml")
    monkeypatch.setenv("TRAIN_ARGS", "--train.steps=40")
    assert run.main(["--usd=20"]) == 0
    trained = machines.launches[1][2]
    assert (trained["CONFIG"], trained["TRAIN_ARGS"].split()[-1]) == ("trainer/configs/debug.yaml", "--train.steps=40")
    assert "--model.layers" not in trained["TRAIN_ARGS"]
    assert "CONFIG" not in machines.launches[0][2]
    assert "loss" not in budgets.outcome(folder_of(machines), 1)["forecast"]


def test_more_money_goes_on_from_the_step_before_the_rates_fell(machines, monkeypatch):
    machines.trainings *= 2
    assert run.main(["--usd=20"]) == 0
    base = folder_of(machines)
    monkeypatch.setenv("RUN", "20usd")
    with pytest.raises(ConfigError, match="its training had no cooldown, so there is no step"):
        run.main(["--add-usd=10"])
    course.add(base, 1, course.Change("anneal", 8, steps=4, why="budget"))
    count = len(machines.launches)
    asked: list[list[str]] = []
    monkeypatch.setattr(plan, "ask", lambda arguments: asked.append(list(arguments)) or planned())
    assert run.main(["--add-usd=10"]) == 0
    size = planned()["plans"][0]["size"]
    assert asked == [
        ["--usd=30", "--prepared", "--gpus=A100:8", "--cloud=lambda", f"--size={size}", "--recipe=speedrun"]
    ]
    trained, evaluated, exported = (settings for _, _, settings in machines.launches[count:])
    assert trained["RUN"] == evaluated["RUN"] == exported["RUN"] == "20usd-plus-10usd"
    assert trained["TRAIN_ARGS"].endswith(f" --run.branch_from={base}@trunk")
    assert trained["TRAIN_ARGS"].count("--train.steps=") == 1
    assert trained["DATA"] == machines.launches[0][2]["DATA"]
    assert float(trained["MAX_USD"]) < 10
    assert (Path(base.url) / "checkpoints/step-00000012/COMPLETE").exists(), "the first model stays"
    assert run.main(["--add-usd=10"]) == 0
    assert len(machines.launches) == count + 3


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sum_given", fast_only(["0", "-5", "20 USD", "1e9", "", "1"], {"20 USD", "", "1"}))
def test_a_bad_sum_gets_the_plan_s_sentence_and_nothing_is_stored(machines, sum_given, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("BUCKET", str(machines.bucket))
    monkeypatch.setattr(plan, "_check_clouds", lambda: None)
    with pytest.raises(ConfigError, match=r"^--usd(=1 is less than any plan here needs; the least that works| is )"):
        run.main([f"--usd={sum_given}", "--offline"])
    assert not (machines.bucket / "runs").exists()


def no_cloud(machines: Machines, monkeypatch) -> list[str]:
    for cloud in providers.CLOUDS.values():
        monkeypatch.setattr(cloud, "is_configured", lambda: False)
    return ["--usd=20"]


def another_vocabulary(machines: Machines, monkeypatch) -> list[str]:
    url = str(machines.bucket / "data/mine")
    source = corpus.write_parquet(machines.bucket / "source", [corpus.documents(60)])
    corpus.prepare_set(source, url, corpus.vocab_bpe())
    stored = Path(url) / "manifest.json"
    stored.write_text(stored.read_text().replace('"name": "gpt2"', '"name": "llama"'))
    monkeypatch.setenv("DATA", "mine")
    return ["--usd=20"]


def another_sum(machines: Machines, monkeypatch) -> list[str]:
    run.main(["--usd=20"])
    monkeypatch.setenv("RUN", "20usd")
    return ["--usd=30"]


def a_run_by_hand(machines: Machines, monkeypatch) -> list[str]:
    GoldenRun(machines.bucket / "runs/20usd")
    return ["--usd=20"]


def more_for_no_run(machines: Machines, monkeypatch) -> list[str]:
    monkeypatch.setenv("RUN", "none")
    return ["--add-usd=10"]


def a_url(machines: Machines, monkeypatch) -> list[str]:
    monkeypatch.setenv("RUN_URL", "s3://b/runs/x")
    return ["--usd=20"]


def a_damaged_budget(machines: Machines, monkeypatch) -> list[str]:
    path = machines.bucket / "runs/20usd/budget/000001/plan.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"format": "run-budget", "version": 9}')
    return ["--usd=20"]


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (no_cloud, ConfigError, r"no cloud has credentials on this computer \(.*run `make plan` to see what the sum"),
        (another_vocabulary, DataError, "holds tokens of the vocabulary 'llama', but the models of a plan read 'gpt2'"),
        (another_sum, ConfigError, r"USD is 30, but .* has begun with \$20; to spend more on it give ADD_USD=10"),
        (a_run_by_hand, ConfigError, "holds a run that `make run` has not begun; give another RUN"),
        (more_for_no_run, ConfigError, "holds no run that `make run` has begun; check RUN and BUCKET"),
        (a_url, ConfigError, "RUN_URL and DATA_URL do not name the folders of all stages; give BUCKET, RUN and DATA"),
        (a_damaged_budget, DataError, "not a budget of this release .*; choose another RUN"),
        (lambda *_: [], ConfigError, "usage: python -m launch.run --usd=SUM"),
        (lambda *_: ["--usd=20", "--add-usd=5"], ConfigError, "usage: python -m launch.run --usd=SUM"),
        (lambda *_: ["--add-usd=5"], ConfigError, "RUN is empty; name the run that is to go on"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(
    machines, monkeypatch, given: Callable[..., list[str]], kind: type[LauncherError], said: str
):
    arguments = given(machines, monkeypatch)
    count = len(machines.launches)
    with pytest.raises(kind, match=said) as problem:
        run.main(arguments)
    assert "\n" not in str(problem.value)
    assert len(machines.launches) == count


def test_two_commands_at_once_do_not_begin_a_run_twice(machines, monkeypatch):
    real = budgets.newest
    monkeypatch.setattr(budgets, "newest", lambda folder: None)
    run.main(["--usd=20"])
    count = len(machines.launches)
    monkeypatch.setattr(RunFolder, "segment_numbers", lambda folder: [])
    (machines.bucket / "runs/20usd/run.json").unlink()
    with pytest.raises(RunError, match="another command has just begun this run"):
        run.main(["--usd=20"])
    monkeypatch.setattr(budgets, "newest", real)
    assert len(machines.launches) == count
