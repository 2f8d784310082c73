"""What runs on the user's machine: checks before a launch, pull, logs, what is left, and .env.example."""

import ast
import http.server
import json
import re
import threading
from pathlib import Path

import boto3
import pytest
import yaml
from moto import mock_aws

from core import journal, schema, storage
from core.errors import ConfigError, ObjectNotFound
from launch import check, left, logs, memory, pull, registry, submit
from tests import corpus

ROOT = Path(__file__).parent.parent


def task(name: str) -> dict:
    return yaml.safe_load((ROOT / f"sky/{name}.yaml").read_text())


def marks(findings) -> list[tuple[str, str]]:
    return [(finding.mark, finding.what) for finding in findings]


# --- check -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path, vocab_bpe, monkeypatch) -> dict[str, str]:
    """Settings of a training task whose data is there, in a folder that stands for the bucket."""
    source = corpus.write_parquet(tmp_path / "source", [corpus.documents(60)])
    corpus.prepare_set(source, str(tmp_path / "data/tokens"), vocab_bpe)
    monkeypatch.chdir(ROOT)
    envs = {name: value for name, value in task("pretrain-8xa100")["envs"].items() if value}
    return {**envs, "BUCKET": f"file://{tmp_path}", "DATA": "tokens"}


def test_config_that_divides_and_fits_is_ok(ready):
    assert {mark for mark, _ in marks(check.check_config(task("pretrain-8xa100"), ready))} == {"ok"}


def test_config_for_more_memory_than_the_gpu_has_is_refused_with_a_cure(ready):
    ready["TRAIN_ARGS"] = "--batch.micro_batch=64 --model.width=1536 --model.layers=24"
    found = marks(check.check_config(task("pretrain-8xa100"), ready))
    assert ("x", "config: batch.micro_batch = 64 needs about 96 GB, a A100 has 40; try --batch.micro_batch=16") in found


def test_micro_batches_that_do_not_divide_over_all_ranks_are_refused(ready):
    ready["TRAIN_ARGS"] = "--batch.tokens=262144 --batch.micro_batch=32"
    found = marks(check.check_config(task("pretrain-multinode"), ready))
    assert ("x", "config: 8 micro-batches do not divide over 16 ranks of A100:8") in found


def test_unknown_setting_is_refused(ready):
    ready["TRAIN_ARGS"] = "--train.stepz=5"
    with pytest.raises(ConfigError, match=r"did you mean train\.steps"):
        list(check.check_config(task("pretrain-8xa100"), ready))


def test_data_that_is_there_and_data_that_is_not(ready):
    assert next(check.check_data(task("pretrain-8xa100"), ready)).mark == "ok"
    (finding,) = check.check_data(task("pretrain-8xa100"), {**ready, "DATA": "elsewhere"})
    assert finding.mark == "x"
    assert "`make prep-data` makes it" in finding.what


def test_bucket_is_tried_and_left_clean(ready, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert next(check.check_bucket(task("pretrain-8xa100"), ready)).mark == "ok"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "keys", "mark", "word"),
    [
        ("pretrain-8xa100", {"AWS_ACCESS_KEY_ID": "a"}, "x", "AWS_SECRET_ACCESS_KEY is empty, its partner is set"),
        ("pretrain-gh200", {}, "x", "a node on lambda could not reach the bucket"),
        ("pretrain-8xa100", {}, "!", "a node on lambda could not reach the bucket"),
        ("pretrain-8xa100-spot", {}, "ok", "the node's own role"),
        ("pretrain-gh200", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, "ok", "keys for the bucket"),
    ],
)
def test_empty_secrets_are_found_before_the_node_finds_them(name, keys, mark, word):
    (finding,) = check.check_secrets(task(name), keys)
    assert finding.mark == mark
    assert word in finding.what


@mock_aws
def test_a_bucket_in_another_region_is_named_with_its_price(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    location = {"LocationConstraint": "us-west-2"}
    boto3.client("s3", region_name="us-west-2").create_bucket(Bucket="far", CreateBucketConfiguration=location)
    settings = {"BUCKET": "far", "DATA": "none"}
    found = [what for _, what in marks(check._region(task("pretrain-8xa100-spot"), settings, "s3://far"))]
    assert "bucket: it is in us-west-2; a machine at aws/us-east-1 reads it for $0.02 per GB" in found
    assert not [what for what in found if "aws/us-west-2 reads" in what]


def test_what_cannot_be_asked_is_no_failure():
    def check_broken(task, settings):
        raise RuntimeError("no network here")
        yield

    (finding,) = check._safely(check_broken, {}, {})
    assert finding.mark == "?"
    assert "broken: could not be asked (RuntimeError: no network here)" in finding.what


def test_a_managed_job_is_priced_by_a_plain_dry_run(monkeypatch):
    monkeypatch.setattr(submit, "find_sky", lambda: "sky")
    path = "sky/pretrain-8xa100-spot.yaml"
    given = {"BUCKET": "b", "AWS_ACCESS_KEY_ID": "a"}
    command = " ".join(check.pricing_command(path, task("pretrain-8xa100-spot"), given))
    assert command.startswith("sky launch --cluster pretrain-8xa100-spot --yes --env BUCKET=b")
    assert command.endswith(f"--secret AWS_ACCESS_KEY_ID --dryrun {path}")


# --- memory ----------------------------------------------------------------------------------------------------


def settings_of(*arguments: str) -> schema.TrainConfig:
    from core import config

    return config.load(schema.TrainConfig, [str(ROOT / "trainer/configs/gpt2-124m.yaml"), *arguments, *URLS], {})


URLS = ("--run.url=/r", "--data.url=/d")


def test_the_estimate_counts_weights_optimizer_activations_and_logits():
    """124M parameters x 16 bytes, 32 x 1024 tokens x 768 x (34 x 12 + 8), 4096 rows of logits x 50304 x 6 bytes."""
    by_hand = 124_475_904 * 16 + 32 * 1024 * 768 * (34 * 12 + 8) + 4096 * 50304 * 6
    assert memory.needed_bytes(settings_of()) == pytest.approx(by_hand, rel=0.01)


def test_the_preset_fits_every_gpu_that_its_tasks_name():
    assert [memory.problem(settings_of(), gpu) for gpu in ("A100", "A100-80GB", "GH200", "?")] == [None] * 4


def test_a_model_that_fits_nowhere_asks_for_a_larger_gpu():
    problem = memory.problem(settings_of("--model.width=8192", "--model.heads=64", "--model.layers=64"), "A100")
    assert problem.endswith("choose a larger GPU or a smaller model")


# --- registry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("ghcr.io/me/image:1.0", ("ghcr.io", "me/image", "1.0")),
        ("me/image", ("registry-1.docker.io", "me/image", "latest")),
        ("debian:12", ("registry-1.docker.io", "library/debian", "12")),
        ("localhost:5000/image@sha256:ab", ("localhost:5000", "image", "sha256:ab")),
    ],
)
def test_references_are_read_as_docker_does(reference, parts):
    assert registry.split(reference) == parts


@pytest.fixture
def registry_host():
    """A registry with one image for one platform, behind a token as public registries have it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            host = f"http://{self.headers['Host']}"
            if self.path.startswith("/token"):
                return self.answer({"token": "for-all"})
            if self.headers.get("Authorization") != "Bearer for-all":
                return self.answer({}, 401, {"WWW-Authenticate": f'Bearer realm="{host}/token",service="s"'})
            if self.path == "/v2/me/image/manifests/1":
                entries = [{"platform": {"os": "linux", "architecture": "amd64"}}]
                entries += [{"platform": {"os": "unknown", "architecture": "unknown"}}]  # an attestation
                return self.answer({"manifests": entries})
            return self.answer({}, 404)

        def answer(self, document, code=200, headers=()):
            self.send_response(code)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_platforms_of_a_public_image(registry_host):
    assert registry.platforms(f"{registry_host}/me/image:1") == {"linux/amd64"}


def test_an_image_that_is_not_there_one_sentence(registry_host):
    with pytest.raises(ConfigError, match=r"cannot be read from 127\.0\.0\.1:\d+ \(HTTP 404\); push it"):
        registry.platforms(f"{registry_host}/me/image:2")


def test_an_image_for_another_architecture_is_refused(registry_host):
    settings = {"IMAGE": f"{registry_host}/me/image:1"}
    with_suffix = {**task("pretrain-gh200"), "setup": "bash launch/container.sh image train"}
    real = registry.platforms
    registry.platforms = lambda reference: real(reference.removesuffix("-train"))
    try:
        (finding,) = check.check_image(with_suffix, settings)
    finally:
        registry.platforms = real
    assert finding.mark == "x"
    assert "not for linux/arm64" in finding.what


# --- what is left ----------------------------------------------------------------------------------------------


@pytest.fixture
def account(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        yield boto3.client("ec2", region_name="us-east-1")


TAGS = [{"Key": "project", "Value": "pretrain-launcher"}]


def test_nothing_of_ours_is_nothing_left(account):
    account.run_instances(ImageId="ami-12345678", MinCount=1, MaxCount=1)  # somebody else's
    assert left.aws_left((), ["us-east-1"]) == []


def test_instances_and_volumes_of_ours_are_named_and_only_volumes_ended(account):
    tags = [{"ResourceType": "instance", "Tags": TAGS}]
    account.run_instances(ImageId="ami-12345678", MinCount=1, MaxCount=1, TagSpecifications=tags)
    tags = [{"ResourceType": "volume", "Tags": TAGS}]
    account.create_volume(AvailabilityZone="us-east-1a", Size=100, TagSpecifications=tags)
    machine, volume = left.aws_left((), ["us-east-1"])
    assert re.fullmatch(r"aws us-east-1: \S+ i-\w+ \(running\)", str(machine))
    assert machine.end is None, "a label does not tell yours from a colleague's"
    assert re.fullmatch(r"aws us-east-1: unattached volume vol-\w+, 100 GB", str(volume))
    volume.end()
    assert left.aws_left((), ["us-east-1"]) == [machine]


def test_the_label_is_that_of_the_tasks():
    for path in (ROOT / "sky").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["resources"]["labels"] == dict([left.LABEL])


def test_a_cloud_that_does_not_answer_is_not_nothing(monkeypatch):
    def lambda_left(names):
        raise OSError("timed out")

    monkeypatch.setattr(left, "aws_left", lambda names: [])
    monkeypatch.setattr(left, "lambda_left", lambda_left)
    found, unknown = left.look(["x"])
    assert found == []
    assert len(unknown) == 1
    assert "timed out" in unknown[0]


# --- pull and logs ---------------------------------------------------------------------------------------------


@pytest.fixture
def run_url() -> str:
    url = "memory://pull/run"
    names = ("run.json", "ledger/segment-000001/start.jsonl", "metrics/segment-000001/00000000-00000001.jsonl")
    for name in names:
        storage.write_bytes(storage.join(url, name), name.encode())
    for step, marker in ((50, True), (100, True), (150, False)):
        folder = storage.join(url, f"checkpoints/step-{step:08d}")
        storage.write_bytes(storage.join(folder, "payload"), b"weights")
        if marker:
            storage.write_bytes(storage.join(folder, "COMPLETE"), b"{}")
    yield url
    for info in storage.list_objects(url):
        storage.delete(info.uri)


def test_pull_takes_the_newest_complete_checkpoint_and_no_other(run_url, tmp_path, capsys):
    pull.main([run_url, str(tmp_path / "here")])
    steps = sorted(path.name for path in (tmp_path / "here/checkpoints").iterdir())
    assert steps == ["step-00000100"]
    assert (tmp_path / "here/ledger/segment-000001/start.jsonl").read_text() == "ledger/segment-000001/start.jsonl"
    assert "checkpoint: step-00000100" in capsys.readouterr().out
    pull.main([run_url, str(tmp_path / "here")])
    assert capsys.readouterr().out.startswith("0 of ")


def test_pull_without_a_run_one_sentence(tmp_path):
    with pytest.raises(ObjectNotFound, match="there is no run here; check RUN and BUCKET"):
        pull.main(["memory://pull/none", str(tmp_path)])


def test_logs_of_all_attempts_are_shown_in_order(tmp_path, capsys):
    for attempt, line in (("20260101T000000Z-node-000", "first"), ("20260102T000000Z-node-000", "second")):
        kept = journal.Journal(str(tmp_path / "logs" / attempt))
        kept.add({"time": 0.0, "line": line})
        kept.close()
    logs.show_stored(str(tmp_path))
    shown = capsys.readouterr().out
    assert shown.index("first") < shown.index("20260102T000000Z") < shown.index("second")
    with pytest.raises(ObjectNotFound, match="no machine has written output yet"):
        logs.show_stored(str(tmp_path / "elsewhere"))


# --- .env.example ----------------------------------------------------------------------------------------------

# Read, but not for a user to set: Python's and the system's own.
NOT_SETTINGS = {"PATH", "HOME", "LD_LIBRARY_PATH"}


def variables_in_python() -> set[str]:
    """Names in environ["X"], environ.get("X"), environment.get("X"), settings["X"], and settings with env="X"."""
    found = set()
    for folder in ("core", "costs", "data_prep", "launch", "trainer"):
        for path in [*(ROOT / folder).rglob("*.py"), ROOT / "cost_report.py"]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "env" and isinstance(node.value, ast.Constant):
                    found.add(node.value.value)
                source = None
                if isinstance(node, ast.Subscript):
                    source, name = node.value, node.slice
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                    source, name = node.func.value, node.args[0]
                if source is not None and isinstance(name, ast.Constant) and isinstance(name.value, str):
                    of = source.attr if isinstance(source, ast.Attribute) else getattr(source, "id", "")
                    if of in ("environ", "environment", "settings") and re.fullmatch(r"[A-Z][A-Z0-9_]+", name.value):
                        found.add(name.value)
    return found - NOT_SETTINGS


def variables_of_tasks() -> set[str]:
    tasks = [yaml.safe_load(path.read_text()) for path in (ROOT / "sky").glob("*.yaml")]
    return {name for task in tasks for part in ("envs", "secrets") for name in task.get(part) or {}}


def test_env_example_names_every_variable_once_and_gives_no_value():
    lines = (ROOT / ".env.example").read_text().splitlines()
    pairs = [line.partition("=")[::2] for line in lines if line and not line.startswith("#")]
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names))
    assert {value for _, value in pairs} == {""}
    found = variables_in_python()
    assert {"RUN_URL", "SKYPILOT_NODE_IPS", "HANG_MINUTES", "AWS_ENDPOINT_URL"} <= found, "the search works"
    assert sorted((found | variables_of_tasks()) - set(names)) == []
