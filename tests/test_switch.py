"""launch/node/switch.py: when it ends a machine, whose machines it leaves alone, and how it reaches a new machine."""

import ast
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import yaml
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from core import pulse
from launch import role
from launch.node import switch
from launch.node.supervise import Child
from tests import fake_metadata
from tests.patience import PATIENCE_SECONDS

KEYS = {"AccessKeyId": "ASIA1", "SecretAccessKey": "secret/+", "Token": "token=="}
ROLE_PATH = "iam/security-credentials/"
OURS = {"project": "pretrain-launcher", "ray-cluster-name": "pretrain-8xa100-1a2b3c4d"}


def described(tags: dict[str, str]) -> str:
    """EC2's answer to DescribeInstances."""
    items = "".join(f"<item><key>{name}</key><value>{value}</value></item>" for name, value in tags.items())
    place = f"<instancesSet><item><instanceId>i-1</instanceId><tagSet>{items}</tagSet></item></instancesSet>"
    space = "http://ec2.amazonaws.com/doc/2016-11-15/"
    whole = f"<reservationSet><item>{place}</item></reservationSet>"
    return f'<DescribeInstancesResponse xmlns="{space}">{whole}</DescribeInstancesResponse>'


class Api(BaseHTTPRequestHandler):
    """EC2 or Lambda: gives `answers` by action or path, 403 without one. `asked` keeps (headers, body) of requests."""

    answers: dict[str, str]
    asked: list[tuple[dict, str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.asked.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self._answer(parse_qs(body).get("Action", [self.path])[0])

    def do_GET(self) -> None:
        self._answer(self.path)

    def _answer(self, key: str) -> None:
        found = self.answers.get(key)
        self.send_response(403 if found is None else 200)
        self.end_headers()
        self.wfile.write((found or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api():
    handler = type("Handler", (Api,), {"answers": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def node(api, monkeypatch):
    """A machine on AWS: its metadata service, and EC2. Returns the metadata service."""
    with fake_metadata.metadata_service() as (service, environment):
        service.items |= {"placement/region": "us-east-1", "instance-id": "i-1", ROLE_PATH: "node"}
        service.items[f"{ROLE_PATH}node"] = json.dumps(KEYS)
        for name, value in {**environment, "AWS_ENDPOINT_URL_EC2": api.url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(switch, "METADATA_SECONDS", PATIENCE_SECONDS)
        yield service


# --- silence ---------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only by `sleep`. `signs` are the times at which a job gives a sign of life."""

    def __init__(self, signs: list[float]):
        self.now, self.signs = 1000.0, signs

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def modified(self) -> int:
        return sum(1000.0 + sign <= self.now for sign in self.signs)


@pytest.mark.parametrize(
    ("signs", "end"),
    [([], 1800), ([600], 2400), ([600, 2300], 4100), ([600, 2500], 2400), (list(range(0, 9000, 10)), 10790)],
)
def test_a_machine_ends_once_it_was_silent_for_so_long(monkeypatch, signs, end):
    clock = Clock(signs)
    monkeypatch.setattr(switch, "time", clock)
    monkeypatch.setattr(switch, "modified", clock.modified)
    switch.wait_for_silence(30.0)
    assert clock.now - 1000.0 == pytest.approx(end, abs=switch.POLL_SECONDS)


@pytest.mark.parametrize(("answers_until", "end"), [(0, 1800), (5000, 5000), (1e9, switch.OTHERS_SECONDS)])
def test_a_node_waits_for_the_others_of_its_cluster(monkeypatch, answers_until, end):
    clock = Clock([])
    monkeypatch.setattr(switch, "time", clock)
    monkeypatch.setattr(switch, "modified", clock.modified)
    monkeypatch.setattr(switch, "cluster_lives", lambda: clock.now - 1000.0 < answers_until)
    switch.wait_for_silence(30.0)
    assert clock.now - 1000.0 == pytest.approx(end, abs=switch.POLL_SECONDS)


def test_a_file_that_is_gone_is_no_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(switch, "ALIVE", str(tmp_path / "gone"))
    assert switch.modified() == switch.modified() == 0


def test_a_supervised_program_is_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(pulse, "_due", {})
    monkeypatch.setenv("ALIVE_FILE", str(tmp_path / "alive"))
    child = Child([sys.executable, "-c", "import time; time.sleep(0.1)"], dict(os.environ), lambda line: None)
    assert child.wait(900).returncode == 0
    assert (tmp_path / "alive").exists()


# --- whose machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "ours"),
    [
        (OURS, True),
        ({**OURS, "ray-cluster-name": "sky-jobs-controller-1a2b3c4d-1a2b3c4d"}, False),
        ({**OURS, "project": "other"}, False),
        ({"ray-cluster-name": "other-1a2b3c4d"}, False),
    ],
)
def test_a_machine_is_told_by_its_tags(node, api, tags, ours):
    api.answers["DescribeInstances"] = described(tags)
    assert switch.is_ours(0.0) is ours


@pytest.mark.parametrize(("profile", "ours"), [(role.ROLE, True), ("skypilot-v1", False)])
def test_without_its_tags_it_is_told_by_its_role(node, profile, ours):
    node.items["iam/info"] = json.dumps({"InstanceProfileArn": f"arn:aws:iam::1:instance-profile/{profile}"})
    assert switch.is_ours(0.0) is ours


def test_a_machine_that_nobody_can_tell_is_asked_for_as_long_again(monkeypatch):
    """A controller must not end by one request that failed; a machine that has lost its network must."""
    asked = []

    def fail() -> None:
        asked.append(1)
        raise OSError("no network")

    clock = Clock([])
    monkeypatch.setattr(clock, "strftime", lambda *_: "", raising=False)
    monkeypatch.setattr(clock, "gmtime", lambda: None, raising=False)
    monkeypatch.setattr(switch, "time", clock)
    monkeypatch.setattr(switch, "own_tags", fail)
    monkeypatch.setattr(switch, "metadata", lambda path: fail())
    assert switch.is_ours(30.0)
    assert clock.now - 1000.0 == pytest.approx(1800, abs=switch.POLL_SECONDS)
    monkeypatch.setattr(switch, "own_tags", lambda: {} if len(asked) > 400 else fail())
    assert not switch.is_ours(30.0), "it answers in time"


def test_the_names_are_those_of_the_launcher():
    assert (switch.ROLE, switch.LABEL) == (role.ROLE, role.LABEL)


# --- the end ---------------------------------------------------------------------------------------------------


def test_a_request_is_signed_as_botocore_signs_it():
    now, url, body = "20261130T120000Z", "https://ec2.eu-north-1.amazonaws.com", "Action=DescribeInstances&Version=1"
    ours = switch.signed(url, "eu-north-1", body, KEYS, now)
    theirs = AWSRequest("POST", f"{url}/", data=body.encode(), headers={"Content-Type": ours["content-type"]})
    theirs.context["timestamp"] = now
    signer = SigV4Auth(Credentials(KEYS["AccessKeyId"], KEYS["SecretAccessKey"], KEYS["Token"]), "ec2", "eu-north-1")
    theirs.headers["X-Amz-Date"] = now
    theirs.headers["X-Amz-Security-Token"] = KEYS["Token"]
    text = signer.string_to_sign(theirs, signer.canonical_request(theirs))
    assert ours["authorization"].rpartition("Signature=")[2] == signer.signature(text, theirs)


@pytest.mark.parametrize("kind", ["drip of headers", "drip with a length", "drip without", "cut", "no HTTP"])
def test_an_answer_that_does_not_end_does_not_keep_a_silent_machine(node, api, tmp_path, kind):
    """EC2 is not reached without the metadata service, so the machine is powered off."""
    node.trouble += [kind] * 1000
    process_id = start(tmp_path, metadata_seconds=0.3)
    try:
        wait_until((tmp_path / "off").exists)
    finally:
        stop(process_id)
    assert not api.asked


@pytest.mark.parametrize("may_terminate", [True, False])
def test_a_silent_machine_is_terminated_or_else_powered_off(node, api, tmp_path, may_terminate):
    """The file as cloud-init starts it, with shorter times."""
    api.answers["DescribeInstances"] = described(OURS)
    if may_terminate:
        api.answers["TerminateInstances"] = "<ok/>"
    process_id = start(tmp_path)
    off = tmp_path / "off"
    wait_until(off.exists)
    stop(process_id)
    actions = [parse_qs(body)["Action"][0] for _, body in api.asked]
    assert actions[:4] == ["DescribeInstances", *["TerminateInstances"] * switch.TRIES]
    assert parse_qs(api.asked[1][1])["InstanceId.1"] == ["i-1"]
    log = (tmp_path / "state/switch.log").read_text()
    assert ("terminated by EC2" in log) is may_terminate
    assert "powered off" in log


def test_a_controller_is_left_alone(node, api, tmp_path):
    api.answers["DescribeInstances"] = described({"ray-cluster-name": "sky-jobs-controller-1a2b3c4d"})
    start(tmp_path)
    log = tmp_path / "state/switch.log"
    wait_until(lambda: log.exists() and "is left alone" in log.read_text())
    assert [parse_qs(body)["Action"][0] for _, body in api.asked] == ["DescribeInstances"]


def test_a_second_one_does_not_start(node, api, tmp_path):
    """It ends nothing: `launch/node/container.sh` starts it on a machine whose boot has started one."""
    process_id = start(tmp_path, minutes=60)
    again = subprocess.run([sys.executable, tmp_path / "switch.py", "--ours"], env=on_node(tmp_path))
    assert again.returncode == 0
    assert (tmp_path / "state/switch.log").read_text().count("without a sign of life") == 1
    stop(process_id)


def test_a_computer_that_no_cloud_rents_is_left_alone(tmp_path, monkeypatch):
    with fake_metadata.metadata_service() as (_, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        write(tmp_path)
        subprocess.run([sys.executable, tmp_path / "switch.py", "--ours"], env=on_node(tmp_path), check=True)
    assert not (tmp_path / "state").exists()


def write(folder: Path, minutes: float = 0.002, metadata_seconds: float = PATIENCE_SECONDS) -> None:
    """A copy for this folder with times for a test, and a `shutdown` that makes a file."""
    text = role.SWITCH.read_text()
    shorter = {"MINUTES": minutes, "GRACE_SECONDS": 0.1, "PAUSE_SECONDS": 0.1, "FOLDER": str(folder / "state")}
    shorter["METADATA_SECONDS"] = metadata_seconds
    for name, value in shorter.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} = "))
        text = text.replace(line, f"{name} = {value!r}")
    (folder / "switch.py").write_text(text)
    (folder / "shutdown").write_text(f"#!/bin/sh\necho $* >> {folder}/off\n")
    (folder / "shutdown").chmod(0o755)


def on_node(folder: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}


def start(folder: Path, minutes: float = 0.002, metadata_seconds: float = PATIENCE_SECONDS) -> int:
    """Start it. Returns the id of its session, in which it goes on."""
    write(folder, minutes, metadata_seconds)
    subprocess.run([sys.executable, folder / "switch.py"], env=on_node(folder), check=True)
    lock = f"{folder}/state/lock"
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(path) == lock:
                return int(path.parent.parent.name)
        except OSError:
            continue
    return 0


def stop(process_id: int) -> None:
    if process_id:
        os.kill(process_id, 9)


def wait_until(holds) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("machines", "ended"),
    [
        ([("a", "10.0.0.1"), ("b", "10.0.0.9")], ["a"]),
        ([("b", "10.0.0.9")], None),
        ([("a", "10.0.0.1"), ("c", "10.0.0.1")], None),  # private addresses of two regions may be equal
    ],
)
def test_on_lambda_only_the_machine_with_this_address_ends(api, tmp_path, monkeypatch, machines, ended):
    (tmp_path / ".lambda_cloud").mkdir()
    (tmp_path / ".lambda_cloud/lambda_keys").write_text("api_key = k\n")
    (tmp_path / "hostname").write_text("#!/bin/sh\necho 10.0.0.1 172.17.0.1\n")
    (tmp_path / "hostname").chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(switch, "LAMBDA", f"{api.url}/")
    listed = [{"id": number, "private_ip": address, "ip": None} for number, address in machines]
    api.answers |= {"/instances": json.dumps({"data": listed}), "/instance-operations/terminate": '{"data": {}}'}
    if ended:
        assert switch.terminate_on_lambda() == "terminated by Lambda"
    else:
        with pytest.raises(OSError, match=r"of its machines have one of the addresses 10\.0\.0\.1"):
            switch.terminate_on_lambda()
    assert [json.loads(body)["instance_ids"] for _, body in api.asked] == ([ended] if ended else [])


# --- the way to a new machine ----------------------------------------------------------------------------------


def test_cloud_init_writes_the_file_and_starts_it(tmp_path, monkeypatch):
    """SkyPilot puts each command as it is into a list in YAML, and cloud-init joins them to a script for sh."""
    monkeypatch.setattr(role, "SWITCH_ON_NODE", str(tmp_path / "per-boot/switch"))
    monkeypatch.setattr(role, "SWITCH", tmp_path / "switch.py")
    (tmp_path / "switch.py").write_text(f"#!/bin/sh\nMINUTES = 30.0  # not of sh\ntouch {tmp_path}/started\n")
    commands = role.start_switch(7.5)
    user_data = "runcmd:\n" + "".join(f"  - {command}\n" for command in commands)
    assert yaml.safe_load(user_data) == {"runcmd": commands}
    subprocess.run(["sh"], input="\n".join(commands), text=True, check=True, stderr=subprocess.DEVNULL)
    assert (tmp_path / "started").exists()
    assert "MINUTES = 7.5 " in (tmp_path / "per-boot/switch").read_text()


def test_the_real_file_fits_into_user_data_and_keeps_its_minutes(tmp_path):
    """EC2 takes 16 KB, of which SkyPilot's own part is less than four."""
    config = tmp_path / ".sky.yaml"
    for minutes, expected in ((None, switch.MINUTES), (7.5, 7.5)):
        commands = role.start_switch(minutes)
        assert sum(map(len, commands)) < 12_000
        config.write_text(yaml.safe_dump({"aws": {"post_provision_runcmd": commands}}))
        assert role.switch_minutes(config) == expected


def test_it_runs_with_the_python_of_an_older_machine():
    """Without our packages, and without syntax that Python 3.8 lacks."""
    text = role.SWITCH.read_text()
    ast.parse(text, feature_version=(3, 8))
    imported = {name for line in text.splitlines() if line.startswith("import ") for name in line.split()[1:]}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_the_switch_takes_over_the_variables_of_the_image_that_sudo_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"HTTPS_PROXY": "http://mine:1"})
    image = tmp_path / "environment"
    image.write_text(
        "# a comment\nAWS_ENDPOINT_URL='http://ec2:5000/'\nSSL_CERT_FILE=/etc/ca.pem\nHTTPS_PROXY=http://image:2\n"
    )
    switch.adopt_environment(str(image))
    assert (switch.endpoint(), os.environ["SSL_CERT_FILE"]) == ("http://ec2:5000", "/etc/ca.pem")
    assert os.environ["HTTPS_PROXY"] == "http://mine:1"
    switch.adopt_environment(str(tmp_path / "none"))
