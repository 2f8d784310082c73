"""What runs on a node around the program: supervision, exit codes, machine facts, network, preflight."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core import journal
from core.errors import ConfigError
from core.run import machine_from_environment
from costs import prices
from launch import machine, network, node, preflight
from launch.machine import Gpu
from launch.supervise import Child, Outcome

ROOT = Path(__file__).parent.parent
A100 = Gpu("NVIDIA A100-SXM4-40GB", 40960.0, "580.95.05", 0, 0)
METADATA = {
    "placement/region": "us-east-1",
    "placement/availability-zone": "us-east-1b",
    "instance-type": "p4d.24xlarge",
    "instance-life-cycle": "on-demand",
}


def child(script: str, lines: list[str], **options) -> Child:
    return Child([sys.executable, "-c", script], os.environ, lines.append, **options)


# --- supervision -----------------------------------------------------------------------------------------------


def test_output_is_kept_line_by_line_and_the_code_is_told():
    lines = []
    outcome = child("import sys; print('one'); print('two', file=sys.stderr); sys.exit(7)", lines).wait(60)
    assert sorted(lines) == ["one", "two"]
    assert outcome == Outcome(7)


def test_a_request_to_stop_reaches_the_worker_below_a_launcher():
    """As torchrun: the workers are its children, and only they know how to save."""
    worker = "import signal,time\nsignal.signal(15, lambda *_: exit(print('saved')))\nprint('ready')\ntime.sleep(60)"
    launcher = f"import subprocess,sys; sys.exit(subprocess.call([sys.executable, '-c', {worker!r}]))"
    lines = []
    running = child(launcher, lines, launched=True)
    stop_when(running, lambda: "ready" in lines)
    outcome = running.wait(60)
    assert lines == ["ready", "saved"]
    assert outcome.stopped


def test_who_does_not_stop_is_killed():
    lines = []
    running = child("import signal,time\nsignal.signal(15, signal.SIG_IGN)\nprint('ready')\ntime.sleep(60)", lines)
    stop_when(running, lambda: "ready" in lines)
    assert running.wait(60, stop_seconds=1).returncode == -signal.SIGKILL


def test_a_hang_prints_the_stacks_and_ends():
    script = "import signal,time\nsignal.signal(10, signal.SIG_IGN)\ndef stuck_here():\n time.sleep(60)\n"
    script += "print('go')\nstuck_here()"
    lines = []
    outcome = child(script, lines).wait(hang_seconds=2)
    assert outcome.hung
    assert any("in stuck_here" in line or "line 4" in line for line in lines), lines


def test_a_hang_that_can_still_save_is_not_aborted():
    script = "import signal,time\nsignal.signal(10, lambda *_: exit(print('saved')))\nprint('go')\ntime.sleep(60)"
    lines = []
    outcome = child(script, lines).wait(hang_seconds=2)
    assert outcome.hung
    assert lines == ["go", "saved"]


def test_nothing_that_the_child_started_outlives_it():
    script = "import subprocess,time\np=subprocess.Popen(['sleep','600'])\nprint(p.pid)\ntime.sleep(3)"
    lines = []
    child(script, lines).wait(60)
    assert gone(int(lines[0]))


def stop_when(running: Child, ready) -> None:
    def wait() -> None:
        while not ready():
            time.sleep(0.05)
        running.stop()

    threading.Thread(target=wait, daemon=True).start()


def gone(pid: int) -> bool:
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


# --- exit codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "told", "code"),
    [
        (Outcome(0), 0, 0),
        (Outcome(1), 33, 33),  # torchrun says 1, whatever its workers say
        (Outcome(1), 34, 34),
        (Outcome(1), None, 1),
        (Outcome(-9), None, 1),
        (Outcome(0), None, 0),  # preparation does not write a code
        (Outcome(-15, stopped=True), None, 33),
        (Outcome(1, stopped=True), None, 1),
    ],
)
def test_exit_code(outcome, told, code):
    assert node.exit_code(outcome, told) == code


def test_a_bad_node_is_left_a_few_times_then_the_job_ends(tmp_path):
    run_url = str(tmp_path)
    codes = [node.refuse(run_url, f"{stamp(-60 + n)}-node-000", ["GPU 3 is gone"]) for n in range(4)]
    assert codes == [node.BAD_NODE] * node.REFUSALS_PER_DAY + [1]
    assert json.loads(next((tmp_path / "refused").iterdir()).read_text())["problems"] == ["GPU 3 is gone"]


def test_refusals_of_yesterday_do_not_count(tmp_path):
    for number in range(5):
        node.refuse(str(tmp_path), f"{stamp(-2 * 86400 + number)}-node-000", ["slow"])
    assert node.refuse(str(tmp_path), f"{stamp(0)}-node-000", ["slow"]) == node.BAD_NODE


def stamp(seconds: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + seconds))


def test_the_node_program_runs_a_module_and_keeps_its_log(tmp_path):
    environment = {**os.environ, "RUN_URL": str(tmp_path), "CLOUD": "", "SKYPILOT_CLUSTER_INFO": ""}
    command = [sys.executable, "-m", "launch.node", "-m", "platform"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (attempt,) = (tmp_path / "logs").iterdir()
    events, problems = journal.read(str(attempt))
    lines = [event["line"] for event in events]
    assert problems == []
    assert lines[0].startswith("node 1 of 1: ?/?/?")
    assert any(line.startswith("Linux") for line in lines)
    assert lines[-1] == "exit code 0"


def test_without_a_run_url_one_sentence():
    command = [sys.executable, "-m", "launch.node", "-m", "platform"]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: RUN_URL is not set")


# --- machine ---------------------------------------------------------------------------------------------------


def facts(cloud: str, found: list[Gpu], spot_price=None, metadata=METADATA, **environment: str) -> dict[str, str]:
    info = {"cluster_name": "c", "cloud": cloud, "region": "us-east-1", "zone": "us-east-1b"}
    environment = {"SKYPILOT_CLUSTER_INFO": json.dumps(info), **environment}
    return machine.describe(environment, found, metadata.get, lambda *_: spot_price)


def test_on_demand_machine_on_aws():
    found = facts("AWS", [A100] * 8, SKYPILOT_NUM_NODES="2")
    assert found["INSTANCE_TYPE"] == "p4d.24xlarge"
    assert found["USE_SPOT"] == "false"
    assert float(found["USD_PER_HOUR"]) == pytest.approx(2 * 21.957642, rel=1e-5)
    assert found["PRICE_SOURCE"] == prices.SNAPSHOT
    assert machine_from_environment(None, 8, found).zone == "us-east-1b"


def test_spot_price_is_the_one_in_force_where_aws_tells_it():
    spot = {**METADATA, "instance-life-cycle": "spot"}
    assert facts("AWS", [A100] * 8, 8.5, spot)["USD_PER_HOUR"] == "8.5"
    guessed = facts("AWS", [A100] * 8, None, spot)
    assert guessed["PRICE_SOURCE"].startswith("median over the zones of us-east-1")


def test_lambda_node_is_known_by_its_gpus():
    assert facts("Lambda", [A100] * 8)["INSTANCE_TYPE"] == "gpu_8x_a100"
    eighty = Gpu("NVIDIA A100-SXM4-80GB", 81920.0, "580.0", 0, 0)
    assert facts("Lambda", [eighty] * 8)["INSTANCE_TYPE"] == "gpu_8x_a100_80gb_sxm4"
    gh200 = Gpu("NVIDIA GH200 480GB", 97871.0, "580.0", 0, 0)
    assert facts("Lambda", [gh200])["USD_PER_HOUR"] == "2.29"


def test_types_of_one_price_give_the_price_and_no_type():
    """Lambda has one A100 as SXM and as PCIe, which the driver's name does not always tell apart."""
    found = facts("Lambda", [A100])
    assert "INSTANCE_TYPE" not in found
    assert found["USD_PER_HOUR"] == "1.99"


def test_what_is_not_known_stays_unset():
    found = facts("AWS", [], metadata={})
    assert "USD_PER_HOUR" not in found
    assert "INSTANCE_TYPE" not in found
    assert machine.describe({}, []) == {}


def test_what_the_user_says_wins():
    found = facts("AWS", [A100] * 8, USD_PER_HOUR="3.5", PRICE_SOURCE="contract")
    assert "USD_PER_HOUR" not in found


# --- network ---------------------------------------------------------------------------------------------------


def test_rendezvous_of_two_nodes():
    environment = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    arguments = network.rendezvous({**environment, "SKYPILOT_NUM_GPUS_PER_NODE": "8"})
    assert arguments == [
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=8",
        "--master-addr=10.0.0.1",
        "--master-port=29500",
    ]


def test_interface_is_found_by_the_address_that_others_know():
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("203.0.113.7") is None
    found = network.settings({"SKYPILOT_NODE_IPS": "127.0.0.1 10.0.0.2"})
    assert found["GLOO_SOCKET_IFNAME"] == "lo"
    assert found["NCCL_SOCKET_IFNAME"] == "=lo"


def test_efa_only_where_device_and_plugin_are(tmp_path, monkeypatch):
    (tmp_path / "uverbs0").touch()
    environment = {"SKYPILOT_NODE_IPS": "127.0.0.1 10.0.0.2", "LD_LIBRARY_PATH": "/x"}
    assert "FI_PROVIDER" not in network.settings(environment, tmp_path)
    monkeypatch.setattr(network, "EFA_LIBRARIES", (str(tmp_path),))
    found = network.settings(environment, tmp_path)
    assert found["FI_PROVIDER"] == "efa"
    assert found["LD_LIBRARY_PATH"] == f"{tmp_path}:/x"
    assert "FI_PROVIDER" not in network.settings(environment, tmp_path / "none")


def test_a_rank_without_an_address_is_refused():
    with pytest.raises(ConfigError, match="SKYPILOT_NODE_RANK is 1, but SKYPILOT_NODE_IPS has 1 addresses"):
        network.nodes({"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "1"})


# --- preflight -------------------------------------------------------------------------------------------------


def test_healthy_gpus_have_no_problem():
    environment = {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "INSTANCE_TYPE": "p4d.24xlarge"}
    assert preflight.gpu_problems(environment, [A100] * 8) == []


@pytest.mark.parametrize(
    ("environment", "found", "problem"),
    [
        ({}, [A100] * 7, "8 GPUs were asked for, the driver sees 7"),
        ({"INSTANCE_TYPE": "p5.48xlarge"}, [A100] * 8, "a p5.48xlarge has H100, the driver sees NVIDIA A100"),
        ({"INSTANCE_TYPE": "p4de.24xlarge"}, [A100] * 8, "a p4de.24xlarge has A100-80GB"),
        ({}, [Gpu(A100.name, 40960.0, "580", 2, 0)] * 8, "GPU 0 has 2 uncorrectable memory errors"),
        ({}, [Gpu(A100.name, 40960.0, "580", 0, 1)] * 8, "GPU 0 could not remap"),
        (
            {"NODE_XIDS": "NVRM: Xid (PCI:0000:10:1c): 79, pid=1, GPU has fallen off the bus."},
            [A100] * 8,
            "the kernel reports a GPU fault: NVRM: Xid (PCI:0000:10:1c): 79",
        ),
    ],
)
def test_sick_gpus_are_named(environment, found, problem):
    problems = preflight.gpu_problems({"SKYPILOT_NUM_GPUS_PER_NODE": "8", **environment}, found)
    assert problems
    assert problems[0].startswith(problem)


def test_faults_of_programs_are_no_reason_to_leave():
    environment = {"NODE_XIDS": "NVRM: Xid (PCI:0000:10:1c): 31, pid=1, MMU Fault\nNVRM: Xid (PCI:0000:10:1c): 43, x"}
    assert preflight.gpu_problems(environment, [A100]) == []


def test_an_old_driver_is_nobodys_fault_but_ends_the_job():
    with pytest.raises(ConfigError, match=r"driver is 570\.12, the image's CUDA 13\.0 needs R580"):
        preflight.check_driver([Gpu(A100.name, 40960.0, "570.12", 0, 0)])


def test_a_slow_link_and_a_wrong_clock_are_judged():
    report = preflight.Report(figures={"all_reduce_gb_per_s": 20.0, "clock_skew_seconds": -400.0})
    preflight.judge(report, {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}, [A100] * 8, rehearsal=False)
    assert [problem.split(",")[0] for problem in report.problems] == [
        "the GPUs all-reduce 20 GB/s",
        "the clock is -400 s off the bucket's",
    ]
    healthy = preflight.Report(figures={"all_reduce_gb_per_s": 230.0, "clock_skew_seconds": 1.0})
    preflight.judge(healthy, {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}, [A100] * 8, rehearsal=False)
    assert healthy.problems == []


def test_nvidia_smi_is_read_with_and_without_counters(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB, 40960, 580.95.05, 0, No'\n"
        "echo 'NVIDIA A10, 23028, 570.1, [N/A], [N/A]'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.gpus() == [A100, Gpu("NVIDIA A10", 23028.0, "570.1", None, None)]
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.gpus() == []


def test_preflight_of_a_rehearsal_measures_and_passes(tmp_path):
    """The whole of it with two gloo ranks instead of GPUs."""
    report = preflight.run({"RUN_URL": str(tmp_path), "DEVICE": "cpu", "RANKS_PER_NODE": "2"}, [])
    assert report.problems == []
    assert report.figures["all_reduce_gb_per_s"] > 0
    assert report.figures["bucket_read_mb_per_s"] > 0
    assert not list((tmp_path / "preflight").iterdir()), "the probe is deleted"


def test_a_failing_worker_has_the_last_word(tmp_path):
    """One sentence, not torchrun's own traceback, and no run is begun."""
    settings = {"RUN_URL": str(tmp_path), "DATA_URL": str(tmp_path / "none"), "DEVICE": "cpu", "CLOUD": ""}
    command = [sys.executable, "-m", "launch.node", "-m", "trainer.train", "trainer/configs/debug.yaml"]
    command += ["--train.device=cpu"]
    environment = {**os.environ, **settings}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "there is no manifest; prepare the data first" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run.json").exists()


def test_the_launcher_needs_neither_torch_nor_skypilot():
    """It runs in the prep image and on a laptop; the sky command is a program beside it."""
    names = [f"launch.{path.stem}" for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__"]
    code = "import importlib,sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "print(sorted({'torch', 'sky', 'boto3'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
