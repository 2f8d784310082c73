"""launch/node/container.sh with a docker that records its arguments; test_launch_lab.py runs it on a real engine."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch/node/container.sh"
DOCKER = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$RECORD"
case "$1 $2" in
  "image inspect") if [[ $* == *Architecture* ]]; then echo "${IMAGE_ARCH:-amd64}"; else echo sha256:1234; fi ;;
  "container inspect") [ -e "$RECORD.running" ] || exit 1 ;;
  "run --rm")
    bash -c "${PROGRAM:-true}" & echo $! >"$RECORD.new"; mv "$RECORD.new" "$RECORD.running"
    wait $! ;;
  "rm -f") rm -f "$RECORD.running" ;;
  "stop -t") kill -TERM "$(cat "$RECORD.running")"; rm -f "$RECORD.running" ;;
esac
"""


@pytest.fixture
def node(tmp_path):
    """A function that starts container.sh with these variables, and the list of docker's command lines."""
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "uname").write_text("#!/bin/sh\necho x86_64\n")
    (tmp_path / "uname").chmod(0o755)
    record = tmp_path / "record"

    def start(*arguments: str, script: Path = SCRIPT, **settings: str) -> subprocess.Popen:
        path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin"
        environment = {"PATH": path, "HOME": str(tmp_path), "RECORD": str(record)}
        environment |= {"BUCKET": "b", "RUN": "r", "DATA": "d", **settings}
        command = ["bash", str(script), *arguments]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell cannot trap what was ignored when it began.
            preexec_fn=warm.default_signals,
        )

    start.calls = lambda: record.read_text().splitlines()
    return start


def test_the_programs_exit_code_is_the_nodes(node):
    process = node("run", "train", "python", PROGRAM="exit 33")
    process.communicate()
    assert process.returncode == 33


def test_variables_go_by_name_and_empty_ones_do_not(node):
    settings = {
        "BUCKET_SECRET_ACCESS_KEY": "very-secret",
        "AWS_SECRET_ACCESS_KEY": "x",
        "BUCKET_REGION": "",
        "AWS_ENDPOINT_URL": "",
        "UNRELATED": "x",
        "MAX_USD": "5",
    }
    node("run", "train", "python", "-m", "launch.node", **settings).communicate()
    (line,) = [call for call in node.calls() if call.startswith("run --rm")]
    words = line.split()
    given = {words[at + 1] for at, word in enumerate(words) if word == "-e"}
    assert {"BUCKET_SECRET_ACCESS_KEY", "MAX_USD", "RUN_URL", "SEGMENT_STARTED_AT"} <= given
    assert not {"AWS_ENDPOINT_URL", "BUCKET_REGION", "BUCKET", "UNRELATED", "AWS_SECRET_ACCESS_KEY"} & given
    assert "very-secret" not in line
    assert line.endswith("pretrain-launcher:train python -m launch.node")


def test_containers_of_an_earlier_job_are_removed_first(node, tmp_path):
    docker = tmp_path / "docker"
    docker.write_text(DOCKER.replace('[ -e "$RECORD.running" ] || exit 1', "true"))
    node("run", "train", "true").communicate()
    calls = node.calls()
    runs = next(at for at, call in enumerate(calls) if call.startswith("run --rm"))
    assert calls.index("rm -f pretrain-launcher") < runs
    assert calls.index("rm -f pretrain-launcher-alive") < runs


def until(holds, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_cancelled_job_stops_its_container_and_may_start_again(node, tmp_path, number):
    process = node("run", "train", "true", PROGRAM="exec sleep 300")
    until((tmp_path / "record.running").exists, process)
    process.send_signal(number)
    assert process.wait(PATIENCE_SECONDS) == 33
    assert any(call.startswith("stop -t") for call in node.calls())
    assert (tmp_path / ".pretrain-launcher-ended").read_text().strip().isdigit()


@pytest.mark.parametrize(("said", "code"), [(0, 0), (34, 34), (35, 35), (33, 33), (1, 33), (143, 33)])
def test_what_the_program_says_when_it_is_asked_to_stop_counts(node, tmp_path, said, code):
    program = f"trap 'exit {said}' TERM; touch $RECORD.listens; while :; do sleep 0.1; done"
    process = node("run", "train", "true", PROGRAM=program)
    until((tmp_path / "record.listens").exists, process)
    until((tmp_path / "record.running").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == code


def test_a_program_that_ended_by_sigterm_before_it_could_listen_may_start_again(node):
    """`docker stop` in the instant before Python runs."""
    process = node("run", "train", "true", PROGRAM="kill -TERM $$")
    process.communicate()
    assert process.returncode == 33


@pytest.mark.parametrize("call", ["info", "container inspect", "image inspect"])
def test_a_request_to_stop_before_the_container_runs(node, tmp_path, call):
    """While docker is looked for, an old container is removed, the image is asked for its name."""
    docker = tmp_path / "docker"
    wait = f'case "$1 $2" in "{call}"*) touch "$RECORD.here"; until [ -e "$RECORD.go" ]; do sleep 0.1; done ;; esac\n'
    docker.write_text(DOCKER.replace("case", wait + "case", 1))
    process = node("run", "train", "true")
    until((tmp_path / "record.here").exists, process)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "record.go").touch()
    assert process.wait(PATIENCE_SECONDS) == 33
    assert not [line for line in node.calls() if line.startswith("run ")]


def test_set_ups_that_begin_in_one_second_have_records_of_their_own(node, tmp_path):
    """Two machines may give this shell the same process id."""
    (tmp_path / "sudo").write_text("#!/bin/sh\n")
    (tmp_path / "date").write_text("#!/bin/sh\necho 20261130T120000Z\n")
    (tmp_path / "python3").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n')
    for name in ("sudo", "date", "python3"):
        (tmp_path / name).chmod(0o755)
    rented = {"SKYPILOT_CLUSTER_INFO": "{}", "USD_PER_HOUR": "2", "IMAGE": "i"}
    for _ in range(2):
        process = node("image", "prep", **rented)
        assert process.wait(PATIENCE_SECONDS) == 0, process.stdout.read()
        (*_, asked) = (tmp_path / "asked").read_text().splitlines()
        assert re.fullmatch("-m launch.node.arrival begin 20261130T120000Z-setup-[0-9a-f]{8}", asked)
    assert len(set((tmp_path / "asked").read_text().splitlines())) == 2


def test_time_is_accounted_from_the_end_of_the_job_before(node, tmp_path):
    """The program sees when its paid time began: the boot, or later, the end of the job before."""
    ended = int(time.time()) - 7
    (tmp_path / ".pretrain-launcher-ended").write_text(f"{ended}\n")
    process = node(
        "run", "train", "true", PROGRAM="echo began $SEGMENT_STARTED_AT; echo $RUN_URL $DATA_URL $IMAGE_DIGEST"
    )
    output, _ = process.communicate()
    assert f"began {ended}" in output
    assert "s3://b/runs/r s3://b/data/d sha256:1234" in output


def test_an_image_of_another_architecture_is_refused_before_it_runs(node):
    process = node("image", "train", IMAGE="ghcr.io/me/image:1", IMAGE_ARCH="arm64")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "error: image ghcr.io/me/image:1-train is for arm64, this machine is amd64" in output


def test_an_image_is_pulled_or_built(node):
    node("image", "prep", IMAGE="ghcr.io/me/image:1").communicate()
    node("image", "prep", DEVICE="cpu", IMAGE_CACHE="ghcr.io/me/image:1").communicate()
    calls = node.calls()
    assert "pull --quiet ghcr.io/me/image:1-prep" in calls
    (build,) = [call for call in calls if call.startswith("build ")]
    assert "--target prep --tag pretrain-launcher:prep --build-arg TORCH=cpu" in build
    assert "--cache-from ghcr.io/me/image:1-prep" in build


def with_limit(folder: Path, name: str) -> Path:
    """container.sh with a limit of one second."""
    hurried = folder / "checkout/launch/node/container.sh"
    hurried.parent.mkdir(parents=True)
    text, count = re.subn(rf"^{name}=\d+", f"{name}=1", SCRIPT.read_text(), flags=re.M)
    assert count == 1
    hurried.write_text(text)
    return hurried


def test_a_pull_that_does_not_end_ends_the_setup(node, tmp_path):
    docker = tmp_path / "docker"
    docker.write_text(DOCKER.replace("case", 'case "$1" in pull) exec sleep 300 ;; esac\ncase', 1))
    process = node("image", "prep", script=with_limit(tmp_path, "PULL_SECONDS"), IMAGE="ghcr.io/me/image:1")
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 124
    assert "docker pull did not end within 1 s" in output


def test_an_nvidia_smi_that_does_not_answer_holds_up_nothing(node, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 300\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    process = node("image", "prep", script=with_limit(tmp_path, "NVIDIA_SMI_SECONDS"), DEVICE="cuda", IMAGE="me/image")
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert "nvidia-smi did not answer within 1 s" in output


def test_every_call_of_docker_but_the_programs_has_a_limit():
    calls = re.findall(r"^.*\bdocker (?:\"|run|info|pull|build|push).*$", SCRIPT.read_text(), re.M)
    code = [line.strip() for line in calls if not line.strip().startswith("#")]
    unlimited = [line for line in code if "timeout" not in line]
    assert len(unlimited) == 1
    assert unlimited[0].startswith('"${SUDO[@]}" docker run --rm --init')


def test_without_a_bucket_one_sentence(node):
    process = node("run", "train", "true", BUCKET="")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("error: BUCKET is empty; give BUCKET=NAME to make or to sky launch --env")


def test_no_password_reaches_a_command_line(node):
    settings = {"IMAGE": "ghcr.io/me/image:1", "REGISTRY_USER": "me", "REGISTRY_PASSWORD": "very-secret"}
    process = node("push", "prep", **settings)
    process.communicate()
    assert process.returncode == 0
    assert "login --username me --password-stdin ghcr.io" in node.calls()
    assert "very-secret" not in "\n".join(node.calls())


def test_wrong_usage_shows_the_right_one(node):
    process = node("run", "train")
    output, _ = process.communicate()
    assert process.returncode == 2
    assert "launch/node/container.sh run TARGET COMMAND" in output


# --- the dead man's switch -------------------------------------------------------------------------------------


def test_a_rented_machine_gets_the_switch_and_no_other(node, tmp_path):
    (tmp_path / "sudo").write_text('#!/bin/sh\nprintf "sudo %s\\n" "$*" >>"$RECORD"\n')
    (tmp_path / "sudo").chmod(0o755)
    for given in ({}, {"SKYPILOT_CLUSTER_INFO": "{}", "SWITCH_MINUTES": "7"}):
        node("run", "train", "true", **given).communicate()
    started = [call for call in node.calls() if "switch.py" in call]
    assert started == ["sudo -n timeout -k 5 60 python3 launch/node/switch.py --ours 7"]


# --- the time until the machine ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["exit 0", "exit 34", "kill -KILL $$"])
def test_after_the_program_a_small_container_records_that_the_machine_is_up(node, tmp_path, program):
    (tmp_path / "sudo").write_text("#!/bin/sh\n")
    (tmp_path / "sudo").chmod(0o755)
    rented = {"SKYPILOT_CLUSTER_INFO": "{}", "BUCKET_SECRET_ACCESS_KEY": "very-secret"}
    node("run", "train", "true", PROGRAM=program, **rented).communicate()
    calls = node.calls()
    first = next(at for at, call in enumerate(calls) if call.startswith("run --rm"))
    ((at, line),) = [(at, call) for at, call in enumerate(calls) if call.startswith("run --detach")]
    assert at > first
    assert "--name pretrain-launcher-alive" in line
    assert line.endswith("pretrain-launcher:train python -m launch.node.alive")
    words = line.split()
    given = {words[at + 1] for at, word in enumerate(words) if word == "-e"}
    assert {"RUN_URL", "SEGMENT_STARTED_AT", "BUCKET_SECRET_ACCESS_KEY"} <= given
    assert "very-secret" not in line
    assert "--gpus" not in line


def test_a_computer_of_the_users_own_records_no_life(node):
    node("run", "train", "true").communicate()
    assert not [call for call in node.calls() if call.startswith("run --detach")]
