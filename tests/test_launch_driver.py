"""The host's driver and the image's CUDA: looked at before anything is built, decided by whether CUDA initialises.

launch/node/container.sh runs here with a recording nvidia-smi and a recording docker. Only a GPU can show that
CUDA does initialise with NVIDIA's compatibility package.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from clouds.base import Gpu
from core.exit_codes import BAD_NODE, FAILED
from launch.node import preflight

ROOT = Path(__file__).parent.parent
COMPAT = "/usr/local/cuda-13.0/compat"
DOCKER = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$RECORD"
case "$*" in
  "image inspect"*Architecture*) echo amd64 ;;
  "image inspect"*) echo sha256:1234 ;;
  "container inspect"*) exit 1 ;;
  *" test -e /usr/local/cuda-13.0/compat/libcuda.so.1") exit "${LACKS_COMPAT:-0}" ;;
esac
"""
NVIDIA_SMI = """#!/bin/sh
[ "$*" = "--query-gpu=driver_version,name --format=csv,noheader" ] || exit 2
printf '%s\\n' "$ROWS"
exit "${SMI_CODE:-0}"
"""
A100 = "NVIDIA A100-SXM4-40GB"


@pytest.fixture
def node(tmp_path):
    """A function that runs container.sh on 8 GPUs of this driver and name; what it told docker is in `calls`."""
    record = tmp_path / "record"
    for name, text in {"docker": DOCKER, "nvidia-smi": NVIDIA_SMI, "uname": "#!/bin/sh\necho x86_64\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, driver: str, gpu: str = A100, **settings: str) -> subprocess.CompletedProcess:
        record.unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin:/usr/sbin", "HOME": str(tmp_path), "RECORD": str(record)}
        environment |= {"BUCKET": "b", "RUN": "r", "DATA": "d", "DEVICE": "cuda"}
        environment |= {"ROWS": "\n".join([f"{driver}, {gpu}"] * 8), **settings}
        command = ["bash", str(ROOT / "launch/node/container.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        done.calls = record.read_text().splitlines() if record.exists() else []
        done.last_line = (done.stderr.splitlines() or [""])[-1]
        return done

    return run


def run_of(done: subprocess.CompletedProcess) -> str:
    (line,) = [call for call in done.calls if call.startswith("run --rm --init")]
    return line


def build_of(done: subprocess.CompletedProcess) -> str:
    (line,) = [call for call in done.calls if call.startswith("build ")]
    return line


@pytest.mark.parametrize(
    ("driver", "gpu", "settings", "reason"),
    [
        (
            "470.82.01",
            A100,
            {},
            "its driver 470.82.01 is older than R535, the oldest that NVIDIA's compatibility package",
        ),
        (
            "570.00",
            "NVIDIA RTX A6000",
            {},
            "compatibility package does not support its NVIDIA RTX A6000; take a machine",
        ),
        (
            "535.1",
            "NVIDIA GeForce RTX 4090",
            {},
            "does not support its NVIDIA GeForce RTX 4090; take a machine with R580",
        ),
        (
            "570.00",
            A100,
            {"CUDA_COMPAT": "no"},
            "CUDA_COMPAT=no leaves that out of the image; take a machine with R580",
        ),
    ],
)
def test_a_driver_that_cannot_run_the_image_is_refused_before_the_engine_is_asked(node, driver, gpu, settings, reason):
    done = node("image", "train", driver=driver, gpu=gpu, **settings)
    assert done.returncode == BAD_NODE
    assert done.last_line.startswith("error: this node is refused: its driver ")
    assert reason in done.last_line
    assert done.calls == []


@pytest.mark.parametrize("driver", ["535.261.03", "550.163.01", "570.00"])
def test_an_older_driver_of_a_data_centre_gpu_is_no_obstacle(node, driver):
    """The image is built with NVIDIA's package, and its libcuda comes first."""
    done = node("image", "train", driver=driver)
    assert done.returncode == 0, done.stderr
    assert f"driver {driver}, 8 {A100}" in done.stderr
    assert "CUDA_COMPAT" not in build_of(done), "the Dockerfile's default is that torch needs it"
    line = run_of(node("run", "train", "python", driver=driver))
    assert "--gpus all" in line
    assert f"-e LD_LIBRARY_PATH={COMPAT}" in line


def test_a_new_driver_needs_nothing_from_nvidia_and_never_gets_an_older_libcuda(node):
    done = node("image", "train", driver="580.95.05")
    assert "--build-arg CUDA_COMPAT=no" in build_of(done)
    assert "CUDA_COMPAT=yes" in build_of(node("image", "train", driver="580.95.05", CUDA_COMPAT="yes"))
    done = node("run", "train", "python", driver="580.95.05")
    assert "--gpus all" in run_of(done)
    assert "LD_LIBRARY_PATH" not in "\n".join(done.calls)


def test_an_image_for_other_machines_is_built_without_a_look_at_this_one(node):
    assert "CUDA_COMPAT" not in build_of(node("build", "train", driver="580.95.05"))
    assert "--build-arg CUDA_COMPAT=no" in build_of(node("build", "train", driver="580.95.05", CUDA_COMPAT="no"))


def test_a_pulled_image_without_the_package_is_refused_on_an_old_driver(node):
    settings = {"IMAGE": "ghcr.io/me/image:1", "LACKS_COMPAT": "1"}
    done = node("image", "train", driver="570.00", **settings)
    assert done.returncode == BAD_NODE
    assert "and ghcr.io/me/image:1-train does not hold it; take a machine with R580" in done.last_line
    assert node("image", "train", driver="570.00", IMAGE="ghcr.io/me/image:1").returncode == 0
    assert node("image", "train", driver="580.00", **settings).returncode == 0
    assert node("image", "prep", driver="570.00", **settings).returncode == 0, "prep needs no CUDA"


def test_a_rehearsal_does_not_look(node):
    assert node("image", "train", driver="470.82.01", DEVICE="cpu").returncode == 0
    assert "LD_LIBRARY_PATH" not in "\n".join(node("run", "train", "python", driver="570.00", DEVICE="cpu").calls)


@pytest.mark.parametrize("rows", ["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", ""])
def test_where_no_gpu_answers_the_preflight_decides(node, rows):
    done = node("image", "train", driver="", ROWS=rows, SMI_CODE="9", SKYPILOT_SETUP_NUM_GPUS_PER_NODE="8")
    assert done.returncode == 0
    assert "nvidia-smi shows no GPU" in done.stderr
    assert "--gpus" not in run_of(node("run", "train", "python", driver="", ROWS=rows, SMI_CODE="9"))


def test_a_warning_or_a_lost_gpu_does_not_hide_the_others(node):
    """nvidia-smi ends with 14 and 15 then; the container gets the GPUs, and the preflight finds the lost one."""
    rows = f"570.00, {A100}\n[GPU is lost], [GPU is lost]\nWARNING: infoROM is corrupted at gpu 0000:00:1E.0"
    assert "--gpus all" in run_of(node("run", "train", "python", driver="", ROWS=rows, SMI_CODE="14"))
    assert f"driver 570.00, 1 {A100}" in node("image", "train", driver="", ROWS=rows, SMI_CODE="15").stderr


def test_a_managed_job_takes_other_machines_for_a_while_and_ends_then(node):
    """SkyPilot starts it again on 35, as often as it sees it."""
    managed = {"driver": "470.82.01", "SKYPILOT_MANAGED_JOB_ID": "1"}
    just_now, long_ago = f"{time.time():.0f}", f"{time.time() - 3600:.0f}"
    assert node("image", "train", SUBMITTED_AT=just_now, **managed).returncode == BAD_NODE
    for settings in ({"SUBMITTED_AT": long_ago}, {"SUBMITTED_AT": ""}, {}):
        done = node("image", "train", **settings, **managed)
        assert done.returncode == FAILED
        assert "this node is refused, and the job ends" in done.last_line
        assert "its driver 470.82.01 is older than R535" in done.last_line
    assert node("image", "train", driver="470.82.01", SUBMITTED_AT=long_ago).returncode == BAD_NODE


# --- the preflight decides -------------------------------------------------------------------------------------

OLD = Gpu(A100, 40960.0, "570.00", 0, 0)


@pytest.fixture
def old_libcuda(tmp_path) -> Path:
    """The library of a driver that supports CUDA 12.8, as far as its version goes."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    source = tmp_path / "libcuda.c"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 12080; return 0; }\n")
    library = tmp_path / "libcuda.so.570.00"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    (tmp_path / "libcuda.so.1").symlink_to(library.name)
    return library


@pytest.mark.slow
def test_cuda_that_does_not_initialise_refuses_the_machine_and_names_the_library(tmp_path, old_libcuda):
    environment = {"RUN_URL": str(tmp_path / "run"), "DEVICE": "cuda", "RANKS_PER_NODE": "1"}
    environment["LD_LIBRARY_PATH"] = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    report = preflight.run(environment, [OLD])
    (problem,) = report.problems
    assert problem.startswith("CUDA does not initialise on GPU ")
    assert f"with {old_libcuda} (CUDA 12.8): " in problem
    assert "take a machine with a newer driver" in problem
    assert report.driver == "570.00"
    assert "driver 570.00" in preflight.summary(report)


def test_the_library_in_use_is_stated_where_all_is_well():
    report = preflight.PreflightReport(driver="570.00", libcuda=f"{COMPAT}/libcuda.so.580.95.05 (CUDA 13.0)")
    assert preflight.summary(report) == f"driver 570.00; libcuda {COMPAT}/libcuda.so.580.95.05 (CUDA 13.0)"


def test_the_script_and_the_image_agree():
    script = (ROOT / "launch/node/container.sh").read_text()
    assert f"\nBAD_NODE={BAD_NODE}\n" in script
    assert f"\nCOMPAT={COMPAT}\n" in script
    assert f"{COMPAT}/libcuda.so.1" in (ROOT / "requirements/cuda-compat.sh").read_text()
    torch = (ROOT / "requirements/train-cuda.txt").read_text()
    assert "\nnvidia-cuda-runtime==13.0." in torch, "another CUDA: another package, and other drivers"
