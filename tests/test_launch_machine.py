"""What a node finds out about itself: machine facts and price, network, health of its GPUs."""

import json
import os
import re
import socket
import subprocess

import pytest

from clouds import aws, catalog, machine
from clouds.base import Gpu
from core.errors import ConfigError
from core.run.machine import machine_from_environment
from launch.node import network, preflight

A100 = Gpu("NVIDIA A100-SXM4-40GB", 40960.0, "580.95.05", 0, 0)
METADATA = {
    "placement/region": "us-east-1",
    "placement/availability-zone": "us-east-1b",
    "instance-type": "p4d.24xlarge",
    "instance-life-cycle": "on-demand",
}


# --- machine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def facts(monkeypatch):
    """A function that describes a machine, with these answers of AWS's services."""

    def describe(cloud: str, found: list[Gpu], spot_price=None, metadata=METADATA, **environment: str):
        monkeypatch.setattr(aws, "instance_metadata", lambda items, _: [metadata.get(item) for item in items])
        monkeypatch.setattr(aws, "current_spot_price", lambda *_: spot_price)
        info = {"cluster_name": "c", "cloud": cloud, "region": "us-east-1", "zone": "us-east-1b"}
        return machine.describe({"SKYPILOT_CLUSTER_INFO": json.dumps(info), **environment}, found)

    return describe


def test_on_demand_machine_on_aws(facts):
    found = facts("AWS", [A100] * 8, SKYPILOT_NUM_NODES="2")
    assert found["INSTANCE_TYPE"] == "p4d.24xlarge"
    assert found["USE_SPOT"] == "false"
    assert float(found["USD_PER_HOUR"]) == pytest.approx(2 * 21.957642, rel=1e-5)
    assert found["PRICE_SOURCE"] == catalog.SNAPSHOT
    assert machine_from_environment(None, 8, found).zone == "us-east-1b"


def test_spot_price_is_the_one_in_force_where_aws_tells_it(facts):
    spot = {**METADATA, "instance-life-cycle": "spot"}
    assert facts("AWS", [A100] * 8, 8.5, spot)["USD_PER_HOUR"] == "8.5"
    guessed = facts("AWS", [A100] * 8, None, spot)
    assert guessed["PRICE_SOURCE"].startswith("median over the zones of us-east-1")


def test_lambda_node_is_known_by_its_gpus(facts):
    assert facts("Lambda", [A100] * 8)["INSTANCE_TYPE"] == "gpu_8x_a100"
    eighty = Gpu("NVIDIA A100-SXM4-80GB", 81920.0, "580.0", 0, 0)
    assert facts("Lambda", [eighty] * 8)["INSTANCE_TYPE"] == "gpu_8x_a100_80gb_sxm4"
    gh200 = Gpu("NVIDIA GH200 480GB", 97871.0, "580.0", 0, 0)
    assert facts("Lambda", [gh200])["USD_PER_HOUR"] == "2.29"


def test_types_of_one_price_give_the_price_and_no_type(facts):
    """Lambda has one A100 as SXM and as PCIe, which the driver's name does not always tell apart."""
    found = facts("Lambda", [A100])
    assert "INSTANCE_TYPE" not in found
    assert found["USD_PER_HOUR"] == "1.99"


def test_what_is_not_known_stays_unset(facts):
    found = facts("AWS", [], metadata={})
    assert "USD_PER_HOUR" not in found
    assert "INSTANCE_TYPE" not in found
    assert machine.describe({}, []) == {}


def test_what_the_user_says_wins(facts):
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


def test_a_port_that_another_program_has_is_one_sentence_on_the_head_node_of_several(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(network, "MASTER_PORT", port)
        two = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "0"}
        with pytest.raises(
            ConfigError, match=f"^port {port} of the head node 10.0.0.1, .* is in use.*sport = :{port}'"
        ):
            network.check_port(two)
        network.check_port({**two, "SKYPILOT_NODE_RANK": "1"})  # its own port 29500 does not matter
        network.check_port({})
        # On one node every job has a port of its own.
        assert f"--master-port={port}" not in network.rendezvous({})
    network.check_port(two)


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


@pytest.mark.parametrize("text", ["one", "-1", "1.0", "²"])
def test_a_rank_that_is_no_number_is_refused(text):
    with pytest.raises(ConfigError, match=re.escape(f"SKYPILOT_NODE_RANK is {text!r}, must be the number of this")):
        network.nodes({"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": text})
    with pytest.raises(ConfigError, match=re.escape(f"RANKS_PER_NODE is {text!r}, must be a whole number")):
        network.ranks_per_node({"RANKS_PER_NODE": text})


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


@pytest.mark.parametrize(
    ("rehearsal", "ranks", "who"),
    [(True, 2, "2 processes on the CPU"), (True, 1, "1 process on the CPU"), (False, 8, "8 GPUs"), (False, 1, "1 GPU")],
)
def test_an_all_reduce_that_fails_names_no_gpus_where_there_are_none(monkeypatch, rehearsal, ranks, who):
    def fails(command, seconds, variables):
        assert f"--master-port={network.MASTER_PORT}" not in command, "another job may have torchrun's own port"
        return subprocess.CompletedProcess(command, 1, "", "the reason")

    def hangs(command, seconds, variables):
        raise subprocess.TimeoutExpired(command, seconds)

    environment = {"RANKS_PER_NODE": str(ranks)}
    monkeypatch.setattr(preflight, "run_within", fails)
    assert preflight.all_reduce(environment, rehearsal) == f"{who} could not all-reduce; the lines above say why"
    monkeypatch.setattr(preflight, "run_within", hangs)
    assert preflight.all_reduce(environment, rehearsal).startswith(f"{who} did not finish a small all-reduce within ")


def test_a_slow_link_and_a_wrong_clock_are_judged():
    report = preflight.PreflightReport(figures={"all_reduce_gb_per_s": 20.0, "clock_skew_seconds": -400.0})
    preflight.judge(report, {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}, [A100] * 8, rehearsal=False)
    assert [problem.split(",")[0] for problem in report.problems] == [
        "the GPUs all-reduce 20 GB/s",
        "the clock is -400 s off the bucket's",
    ]
    healthy = preflight.PreflightReport(figures={"all_reduce_gb_per_s": 230.0, "clock_skew_seconds": 1.0})
    preflight.judge(healthy, {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}, [A100] * 8, rehearsal=False)
    assert healthy.problems == []


LOST = "[GPU is lost]"
NO_HANDLE = "Unable to determine the device handle for GPU 0000:07:00.0: Unknown Error"
ROW = "NVIDIA A100-SXM4-40GB, 40960, 580.95.05, 0, 0"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi with this output and exit code on the PATH."""

    def install(*lines: str, code: int = 0) -> None:
        (tmp_path / "output").write_text("\n".join(lines) + "\n")
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat '{tmp_path}/output'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def test_nvidia_smi_is_read_with_and_without_counters(nvidia_smi, monkeypatch):
    nvidia_smi(
        "NVIDIA A100-SXM4-40GB, 40960, 580.95.05, 0, No",
        "NVIDIA A10, 23028, 570.1, [N/A], [N/A]",
        "NVIDIA A10G, 23028, 535.1, [Not Supported], Yes",
        "NVIDIA GB10, [N/A], 580.95.05, N/A, [N/A]",
    )
    assert machine.gpus() == [
        A100,
        Gpu("NVIDIA A10", 23028.0, "570.1", None, None),
        Gpu("NVIDIA A10G", 23028.0, "535.1", None, 1),
        Gpu("NVIDIA GB10", None, "580.95.05", None, None),
    ]
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.gpus() == []


@pytest.mark.parametrize(
    ("line", "code", "fault"),
    [
        (", ".join([LOST] * 5), 0, LOST),
        ("NVIDIA A100-SXM4-40GB, [Unknown Error], 580.95.05, [Unknown Error], 0", 0, "[Unknown Error]"),
        ("NVIDIA A100-SXM4-40GB, 40960, 580.95.05, ERR!, 0", 0, "ERR!"),
        (NO_HANDLE, 15, NO_HANDLE),
    ],
)
def test_a_gpu_that_does_not_answer_is_a_finding(facts, nvidia_smi, line, code, fault):
    """It refuses the machine; the others are read, and the machine's price is still known."""
    nvidia_smi(*[ROW] * 7, line, code=code)
    found = machine.gpus()
    assert len(found) == 8
    environment = {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "INSTANCE_TYPE": "p4d.24xlarge"}
    assert preflight.gpu_problems(environment, found) == [f"GPU 7 does not answer, nvidia-smi says: {fault}"]
    nvidia_smi(line, *[ROW] * 7, code=code)
    found = machine.gpus()
    assert preflight.gpu_problems(environment, found) == [f"GPU 0 does not answer, nvidia-smi says: {fault}"]
    assert facts("Lambda", found)["INSTANCE_TYPE"] == "gpu_8x_a100"


def test_rows_count_whatever_the_exit_code(nvidia_smi, caplog):
    nvidia_smi(ROW, "WARNING: infoROM is corrupted at gpu 0000:00:1E.0", code=14)
    assert machine.gpus() == [A100]
    assert "infoROM is corrupted" in caplog.text
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch", code=18)
    assert machine.gpus() == []
    assert "version mismatch" in caplog.text
