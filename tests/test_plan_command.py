"""`cost_report.py plan`: machines and dated prices, what is printed and drawn, the command to type, bad input."""

import dataclasses
import json
import re
import shlex
import socket
import xml.dom.minidom
from datetime import date
from pathlib import Path

import pytest

from clouds import catalog, providers
from clouds.catalog import Catalog, fits
from core.errors import ConfigError
from core.settings import loader
from core.settings.training import PretrainConfig
from core.task import MachineChoice, machine_choice, read_task
from costs import command
from costs.forecast import Assumptions, forecast_of
from costs.plan import chart, machines, own, recipes, view
from costs.plan.machines import Wanted
from tests.conftest import REPOSITORY
from tests.plans import MACHINES, RATES, TODAY, answer

# --- machines and prices -----------------------------------------------------------------------------------------


def test_machines_are_what_the_tasks_launch():
    found, refused = machines.machines(providers.snapshot(), machines.tasks(), Wanted(), TODAY)
    by_name = {each.name: each for each in found}
    gh200 = by_name["1 x GH200, lambda on demand"]
    assert (gh200.task, gh200.options, gh200.usd, gh200.idle_seconds) == ("sky/pretrain-gh200.yaml", (), 2.29, 120)
    spot = by_name["8 x A100, aws spot"]
    assert (spot.task, spot.usd, spot.low, spot.high) == (
        "sky/pretrain-8xa100-spot.yaml",
        pytest.approx((7.8799 + 8.1203) / 2),  # the middle of the zones of us-east-1, its first region
        2.4655,
        9.7315,
    )
    assert "max_hourly_cost: 30" in next(each.why for each in refused if each.what.startswith("8 x H100, lambda"))
    only, _ = machines.machines(
        providers.snapshot(), machines.tasks(), Wanted(on_demand=True, gpus="a100", cloud="lambda"), TODAY
    )
    assert {each.gpus for each in only} == {"A100:1", "A100:2", "A100:4", "A100:8"}
    assert not any(each.spot for each in only)


def test_known_dates_of_prices_are_shown_and_old_prices_can_be_refused():
    found, refused = machines.machines(providers.snapshot(), machines.tasks(), Wanted(stale_days=30), TODAY)
    assert {each.name for each in found if each.gpus == "A100:8"} == {"8 x A100, lambda on demand"}
    assert all(each.priced == date(2026, 11, 9) for each in found)
    why = {each.what: each.why for each in refused}
    assert why["1 x GH200, lambda on demand"].startswith("its price is without a date")
    assert why["8 x A100-80GB, lambda on demand"].startswith("its price is of 2026-09-20")


def test_dates_of_the_snapshot_are_of_prices_in_it():
    offers = providers.snapshot().offers
    for (cloud, instance_type, market), seen in catalog._seen().items():
        for region, usd, _ in seen:
            assert any(
                (each.cloud, each.instance_type) == (cloud, instance_type)
                and region in ("", each.region)
                and (each.usd_spot if market == "spot" else each.usd_on_demand) == usd
                for each in offers
            ), instance_type


def test_the_catalog_that_skypilot_keeps_is_read_without_skypilot(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    file = tmp_path / ".sky/catalogs/v8/lambda/vms.csv"
    file.parent.mkdir(parents=True)
    head, *rows = (catalog.FOLDER / "lambda/vms.csv").read_text().splitlines()
    file.write_text("\n".join([head, *(row.replace(",2.29,", ",1.99,") for row in rows if "gh200" in row)]) + "\n")
    found = providers.dated()
    [gh200] = {each.usd_on_demand for each in found.offers if each.accelerator == "GH200"}
    assert gh200 == 1.99
    assert found.fetched.keys() == {"lambda"}
    assert found.price_date(next(each for each in found.offers if each.accelerator == "GH200"), False) is not None
    assert any(each.cloud == "aws" for each in found.offers), "the snapshot stands in for the other cloud"
    assert not providers.dated(offline=True).fetched


# --- the command -------------------------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> str:
    command.main(["plan", "--offline", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("extra", [(), ("--on-demand",), ("--gpus=A100:8", "--cloud=aws", "--on-demand")])
def test_the_printed_command_launches_the_plan(extra: tuple[str, ...], capsys, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a plan needs no network"))
    document = json.loads(run(capsys, "--usd=40", "--json", *extra))
    assert document["plans"]
    for each in document["plans"][:3]:
        words = shlex.split(each["command"])
        given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        task = f"sky/{given['TASK']}.yaml" if "TASK" in given else each["machine"]["task"]
        assert task == each["machine"]["task"]
        choice = MachineChoice(gpus=given.get("GPUS"), infra=given.get("INFRA"))
        spec = read_task(str(REPOSITORY / task), given, choice)
        launched = {
            (offer.cloud, f"{offer.accelerator}:{offer.accelerators}", request.spot)
            for offer in providers.snapshot().offers
            for request in spec.requests
            if fits(offer, request)
        }
        rented = each["machine"]
        assert launched == {(rented["cloud"], rented["gpus"], rented["spot"])}
        settings = spec.workload.config
        assert settings.train.steps * settings.batch.tokens_per_step == each["tokens"]
        assert recipes.parameters(settings.model) == each["parameters"]
        assert float(given["MAX_USD"]) == each["max_usd"] < 40
        assert each["usd"] == pytest.approx(sum(each["parts"].values()))
        estimated = forecast_of(spec, providers.snapshot(), Assumptions(), RATES).rows
        hours = [row.hours for row in estimated if row.offer.instance_type == rented["instance_type"]]
        assert each["hours"] == pytest.approx(hours[0]), "estimate says the same of this command"


def test_targets_of_the_command_are_those_of_the_makefile():
    text = (REPOSITORY / "launch/targets.mk").read_text()
    for task, words in view._TARGETS.items():
        recipe = text.partition(f"\n{words.removeprefix('make ')}: ")[2].partition("\n\n")[0]
        assert f"sky/{task}.yaml" in recipe.replace("$(call typed,TASK)", "pretrain-8xa100")
    assert "--infra $(call typed,INFRA)" in text
    assert machine_choice(["--infra", "aws/us-east-1"]) == MachineChoice(infra="aws/us-east-1")


def test_the_first_screen_says_what_is_bought_and_what_to_type(capsys):
    said = run(capsys, "--usd=20")
    first = said.splitlines()[0]
    assert re.match(r"\$20.00 buys a \S+ model .* parameters.* trained on .* tokens, in .*: validation loss \d", first)
    for word in ("FineWeb-Edu", "no conversion is known", "all in", "reserve", "not planned", "runner-up", "prices:"):
        assert word in said, word
    columns = [line.split()[-3:] for line in said.splitlines() if line.strip().startswith("all in")]
    assert columns == [["20.00", "20.00", "20.00"]]
    assert re.search(r"^  make run USD=20 BUCKET=my-bucket$", said, re.M)
    assert re.search(r"^  make pretrain\S* .*MAX_USD=", said, re.M)
    assert said.index("make run USD=20") < said.index("The same plans in dollars"), "the command is on the first screen"


def test_the_command_for_all_of_it_has_the_question_s_constraints(capsys):
    said = run(capsys, "--usd=20", "--gpus=A100:8", "--on-demand", "--deadline=6h")
    assert "  make run USD=20 BUCKET=my-bucket DEADLINE=6h GPUS=A100:8 ON_DEMAND=1\n" in said
    said = run(capsys, "--usd=20", "--cloud=lambda", "--size=124M")
    assert "  make run USD=20 BUCKET=my-bucket CLOUD=lambda SIZE=124M\n" in said
    said = run(capsys, "--usd=20", "--gpus=A100:8", "--recipe=gpt2")
    assert "  BUCKET=my-bucket .venv-launch/bin/python -m launch.run --usd=20 --gpus=A100:8 --recipe=gpt2\n" in said


def test_the_other_stages_are_lines_of_the_bill_and_no_part_of_the_training_s_cap(capsys):
    whole, prepared = (
        json.loads(run(capsys, "--usd=20", "--gpus=A100:8", "--json", *flags))["plans"][0]
        for flags in ((), ("--prepared",))
    )
    assert {"preparation", "evaluation", "export"} <= whole["parts"].keys()
    assert "preparation" not in prepared["parts"]
    assert prepared["tokens"] > whole["tokens"]
    for each in (whole, prepared):
        beside = sum(each["parts"].get(name, 0.0) for name in ("storage", "egress", "jobs controller"))
        assert each["machines_usd"] == pytest.approx(20.0 - beside, abs=0.01)
        stages = sum(each["parts"].get(name, 0.0) for name in ("preparation", "evaluation", "export"))
        assert each["max_usd"] == pytest.approx(each["machines_usd"] - stages, abs=0.011)


def test_an_assumption_of_the_estimate_is_one_of_the_plan(capsys):
    usual, calm = (
        json.loads(run(capsys, "--usd=20", "--gpus=A100:8", "--json", *flags))["plans"][0]
        for flags in ((), ("--preemptions-per-hour=0",))
    )
    assert usual["parts"]["restarts and lost work"] > 0
    assert "restarts and lost work" not in calm["parts"]
    assert calm["tokens"] > usual["tokens"]


def test_a_sum_that_is_not_needed_is_named(capsys):
    said = run(capsys, "--usd=1000", "--gpus=GH200", "--deadline=10h")
    assert re.match(r"\$\d\d\.\d\d of \$1,000\.00 buys", said)
    assert re.search(r"^plan 1: the deadline ends it, so that \$\d\d\.\d\d are enough", said, re.M)


def test_dollars_by_line_add_up_to_the_cent(capsys):
    document = json.loads(run(capsys, "--usd=20", "--json"))
    assert document["loss_scale"] == "FineWeb"
    given = answer(20.0, *MACHINES)
    sheet = view.bill(given, TODAY)
    for column in range(1, 4):
        cells = [row[column] for row in sheet.rows[3:] if row[column] != "–"]
        assert sum(round(100 * float(cell)) for cell in cells) == round(100 * float(sheet.foot[column]))


def test_the_chart_is_one_svg_with_a_line_per_machine(tmp_path: Path, capsys):
    run(capsys, "--usd=20", f"--svg={tmp_path / 'loss.svg'}", "--gpus=A100")
    drawing = xml.dom.minidom.parse(str(tmp_path / "loss.svg"))
    lines = [each for each in drawing.getElementsByTagName("path") if "line" in each.getAttribute("class")]
    names = {each.firstChild.data for each in drawing.getElementsByTagName("text") if each.firstChild}
    assert 1 < len(lines) <= chart.LINES
    assert {"8 x A100, aws spot", "$5", "$500"} <= names
    losses = [re.search(r"loss ([\d.]+)", each.firstChild.data)[1] for each in drawing.getElementsByTagName("title")]
    assert len(losses) > chart.POINTS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--usd is empty; give the dollars to spend, such as --usd=20 (make plan USD=20)"),
        (("--usd=0",), "--usd is '0', must be a number of dollars above zero"),
        (("--usd=-5",), "--usd is '-5', must be a number of dollars above zero"),
        (("--usd=20 USD",), "--usd is '20 USD', must be a number of dollars above zero without a currency"),
        (("--usd=inf",), "--usd is 'inf', must be a number"),
        (("--usd=1e9",), "--usd is '1e9', above 100,000"),
        (("--usd=1",), r"--usd=1 is less than any plan here needs; the least that works is \$\d\.\d\d: 124M .* loss"),
        (("--usd=20", "--gpus=H900"), "--gpus is 'H900', must be one of A100-80GB:8, "),
        (("--usd=20", "--gpus=A100:3"), "--gpus is 'A100:3', must be one of A100:1, A100:2, A100:4, A100:8, or"),
        (("--usd=20", "--gpus=L4"), "no plan is possible; 2 of 2 machines: its speed was neither measured"),
        (
            ("--usd=20", "--gpus=A100:1", "--size=1.5B"),
            "no plan is possible; 1 of 1 machine: speedrun 1.5B does not fit: A100: batch.micro_batch_size = 1 needs",
        ),
        (("--usd=20", "--cloud=gcp"), "--cloud is 'gcp', must be one of aws, lambda"),
        (("--usd=20", "--size=7B"), "--size is '7B', must be one of 124M, 254M, 350M, 774M, 1.5B"),
        (("--usd=20", "--recipe=lion"), "--recipe is 'lion', must be one of speedrun, gpt2"),
        (("--usd=20", "--deadline=6"), "--deadline is '6', must be a time above zero such as 90min, 6h or 2d"),
        (("--usd=20", "--deadline=3min"), r"--deadline: no run here is as short; the shortest takes \d+min, on"),
        (("--usd=20", "--refuse-stale=x"), "--refuse-stale is 'x', must be a whole number of days"),
        (("--usd=20", "--reserve=1"), "--reserve is '1', must be a share from 0 to below 1"),
        (("--usd=20", "--unique-tokens=-1"), "--unique-tokens is '-1', must be a number above zero"),
        (("--usd=20", "--svg=s3://b/x.svg"), "--svg is 's3://b/x.svg', which"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: tuple[str, ...], said: str, capsys):
    with pytest.raises(ConfigError) as problem:
        run(capsys, *arguments)
    text = str(problem.value)
    assert text.startswith(said) or re.match(said, text), text
    assert "\n" not in text


def test_a_catalog_without_prices_gets_one_sentence(capsys, monkeypatch):
    bare = tuple(dataclasses.replace(each, usd_on_demand=None, usd_spot=None) for each in providers.snapshot().offers)
    monkeypatch.setattr(providers, "dated", lambda offline: Catalog(bare, "a catalog of today"))
    with pytest.raises(ConfigError, match="no machine has a price in a catalog of today; run `sky check`"):
        run(capsys, "--usd=20")


def test_a_bucket_that_cannot_be_read_only_leaves_out_own_runs(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("BUCKET", str(tmp_path / "nothing"))
    command.main(["plan", "--usd=20"])
    assert "own runs: none in BUCKET has trained" in capsys.readouterr().out
    monkeypatch.setenv("BUCKET", "../x")
    assert own.in_bucket({"BUCKET": "s3://"}).said.startswith("own runs: BUCKET cannot be read (BUCKET is 's3://'")


def test_sizes_are_settings_that_the_trainer_takes():
    for each in recipes.candidates():
        flags = [*each.flags, "--run.url=unused", "--data.url=unused"]
        settings = loader.load(PretrainConfig, [str(REPOSITORY / each.config), *flags], {})
        assert settings.batch.tokens_per_step <= each.batch_cap
        assert each.trained - each.non_embedding == 50304 * settings.model.width
        assert recipes.RECIPES[each.recipe] == each.in_law
