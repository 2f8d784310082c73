"""What is looked at before a launch: settings, memory, keys, bucket, data, image."""

import dataclasses
import http.server
import json
import re
import threading
from pathlib import Path

import pytest

from clouds import providers, skypilot
from core import storage
from core.data import sets
from core.errors import ConfigError
from core.gpus import memory_bytes
from core.run.folder import RunFolder, open_run
from core.settings import loader, memory, training
from core.settings.model import ModelConfig
from core.task import MachineChoice, TaskSpec, read_task
from launch import check, registry
from tests import corpus, stores

ROOT = Path(__file__).parent.parent


def task(name: str, settings: dict[str, str], **choice) -> TaskSpec:
    return read_task(str(ROOT / f"sky/{name}.yaml"), settings, MachineChoice(**choice))


def found_by(check_one: check.Check, name: str, settings: dict[str, str], **choice) -> list[tuple[str, str]]:
    return marks(check_one(task(name, settings, **choice), settings))


def marks(findings) -> list[tuple[str, str]]:
    return [(finding.mark, finding.what) for finding in findings]


# --- check -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path, vocab_bpe, monkeypatch) -> dict[str, str]:
    """Settings of a training task whose data is there, in a folder that stands for the bucket."""
    source = corpus.write_parquet(tmp_path / "source", [corpus.documents(60)])
    corpus.prepare_set(source, str(tmp_path / "data/tokens"), vocab_bpe)
    monkeypatch.chdir(ROOT)
    envs = {name: value for name, value in task("pretrain-8xa100", {}).envs.items() if value}
    return {**envs, "BUCKET": f"file://{tmp_path}", "DATA": "tokens"}


def test_config_that_divides_and_fits_is_ok(ready):
    assert {mark for mark, _ in found_by(check.check_config, "pretrain-8xa100", ready)} == {"ok"}


def test_a_preset_that_fits_says_how_much_it_takes_on_each_kind_of_gpu(ready):
    said = [what for _, what in found_by(check.check_config, "pretrain-8xa100", ready)]
    assert said[1:] == [
        "memory: A100: about 17 of 40 GB per GPU, by estimate, not confirmed on a GPU yet",
        "memory: A100-80GB: about 17 of 80 GB per GPU, by estimate, not confirmed on a GPU yet",
    ]


def test_config_for_more_memory_than_the_gpu_has_is_refused_with_a_cure(ready):
    ready["TRAIN_ARGS"] = "--batch.micro_batch_size=64 --model.width=1536 --model.heads=16 --model.layers=24"
    _, small, large = found_by(check.check_config, "pretrain-8xa100", ready)
    assert small[0] == "x"
    found = re.fullmatch(
        r"memory: A100: batch\.micro_batch_size = 64 needs about (\d+) GB per GPU "
        r"\(by estimate, .*\), it has 40; try (.*)",
        small[1],
    )
    assert int(found[1]) > 80
    cured = {**ready, "TRAIN_ARGS": f"{ready['TRAIN_ARGS']} {found[2]}"}
    assert {mark for mark, _ in found_by(check.check_config, "pretrain-8xa100", cured)} == {"ok"}
    assert large[0] == "x"


def test_a_rehearsal_without_gpus_needs_no_gpu_memory(ready):
    ready |= {"DEVICE": "cpu", "TRAIN_ARGS": "--batch.micro_batch_size=64 --model.width=1536 --model.layers=24"}
    assert [mark for mark, _ in found_by(check.check_config, "pretrain-8xa100", ready)] == ["ok"]


def test_fp8_on_gpus_without_it_is_refused_before_they_are_rented(ready):
    ready["TRAIN_ARGS"] = "--train.precision=fp8"
    found = [what for mark, what in found_by(check.check_config, "pretrain-8xa100", ready) if mark == "x"]
    assert found[0] == "config: train.precision is fp8, but A100 has no fp8 units; set bf16, or take H100"
    assert len(found) == 2  # and the A100 of 80 GB
    assert all(mark == "ok" for mark, _ in found_by(check.check_config, "pretrain-gh200", ready))


def test_micro_batches_that_do_not_divide_over_all_ranks_are_refused(ready):
    ready["TRAIN_ARGS"] = "--batch.tokens_per_step=262144 --batch.micro_batch_size=32"
    found = found_by(check.check_config, "pretrain-8xa100", ready, nodes=2)
    assert ("x", "config: 8 micro-batches do not divide over 16 ranks of A100:8") in found


def test_unknown_setting_is_refused(ready):
    ready["TRAIN_ARGS"] = "--train.stepz=5"
    with pytest.raises(ConfigError, match=r"did you mean train\.steps"):
        found_by(check.check_config, "pretrain-8xa100", ready)


def test_data_that_is_there_and_data_that_is_not(ready):
    assert found_by(check.check_data, "pretrain-8xa100", ready)[0][0] == "ok"
    ((mark, what),) = found_by(check.check_data, "pretrain-8xa100", {**ready, "DATA": "elsewhere"})
    assert mark == "x"
    assert "`make prep-data` makes it" in what


def test_bucket_is_tried_and_left_clean(ready, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert found_by(check.check_bucket, "pretrain-8xa100", ready)[0][0] == "ok"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "keys", "mark", "word"),
    [
        ("pretrain-gh200", {}, "x", "a node on lambda could not reach the bucket"),
        ("pretrain-8xa100", {}, "!", "a node on lambda could not reach the bucket"),
        ("pretrain-8xa100-spot", {}, "ok", "the node's own role"),
        ("pretrain-gh200", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, "x", "never goes to a node"),
        ("pretrain-gh200", {"BUCKET_ACCESS_KEY_ID": "a", "BUCKET_SECRET_ACCESS_KEY": "b"}, "ok", "keys for the bucket"),
        (
            "pretrain-8xa100",
            {"BUCKET_ACCESS_KEY_ID": "a"},
            "x",
            "BUCKET_SECRET_ACCESS_KEY is empty, its partner is set",
        ),
        ("pretrain-8xa100-spot", {"BUCKET": "gs://b"}, "x", "without BUCKET_GOOGLE_KEY a node on aws could not reach"),
        ("pretrain-gh200", {"BUCKET": "az://account/c", "BUCKET_AZURE_KEY": "k"}, "ok", "keys for the bucket are set"),
    ],
)
def test_empty_secrets_are_found_before_the_node_finds_them(name, keys, mark, word):
    assert [(found, word in what) for found, what in found_by(check.check_secrets, name, keys)] == [(mark, True)]


def test_a_store_that_ignores_conditional_writes_is_refused_by_name(s3, bucket, monkeypatch):
    with stores.WithoutConditions(s3) as server:
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", server.url)
        found = found_by(check.check_bucket, "pretrain-8xa100", {"BUCKET": bucket})
        assert [mark for mark, _ in found] == ["x"]
        assert found[0][1].startswith(f"bucket: {bucket} at the endpoint ({server.url}) ignores conditional writes")
        assert storage.list_objects(bucket) == []


def test_a_bucket_in_another_region_is_named_with_its_price(monkeypatch):
    for name in ("BUCKET_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("core.stores.aws.Place.home", lambda place: {"far": "us-west-2"}[place.bucket])
    spot = task("pretrain-8xa100-spot", {"BUCKET": "far"})
    found = [finding.what for finding in providers.CLOUDS["aws"].transfer_findings(spot, "s3://far", 0)]
    assert "bucket: it is in us-west-2; a machine at aws/us-east-1 reads it for $0.02 per GB" in found
    assert not [what for what in found if "aws/us-west-2 reads" in what]


def test_what_cannot_be_asked_is_no_failure():
    def check_broken(task, settings):
        raise RuntimeError("no network here")
        yield

    (finding,) = check.findings(check_broken, {}, {})
    assert finding.mark == "?"
    assert "broken: could not be asked (RuntimeError: no network here)" in finding.what


def test_a_managed_job_is_priced_by_a_plain_dry_run(monkeypatch):
    monkeypatch.setattr(skypilot, "find_sky", lambda: "sky")
    given = {"BUCKET": "b", "BUCKET_ACCESS_KEY_ID": "a"}
    spot = task("pretrain-8xa100-spot", given)
    command = " ".join(check.pricing_command(spot, given, []))
    assert command.startswith("sky launch --cluster pretrain-8xa100-spot --yes --env BUCKET=b")
    assert command.endswith(f"--secret BUCKET_ACCESS_KEY_ID --dryrun {spot.path}")


@pytest.fixture
def tuning(ready, tmp_path) -> dict[str, str]:
    """Settings of fine-tuning whose start and rows are there."""
    data_url, start = f"file://{tmp_path}/data/tokens", f"file://{tmp_path}/runs/base"
    sets.write(data_url, "instructions", "conversation", "by hand", "none", b"{}\n{}\n")
    open_run(RunFolder(start), {}, {"model": dataclasses.asdict(ModelConfig(layers=24, heads=16, width=1024))}, "f")
    storage.write_bytes(f"{start}/checkpoints/step-00000010/COMPLETE", b"{}")
    envs = {name: value for name, value in task("finetune", {}).envs.items() if value}
    return {**envs, "BUCKET": f"file://{tmp_path}", "DATA": "tokens", "START": start}


def test_what_is_tuned_its_rows_and_its_memory_are_looked_for(tuning):
    found = found_by(check.check_data, "finetune", tuning)
    assert found == [
        ("ok", f"start: {tuning['START']} has weights"),
        ("ok", "data: 2 rows of 'instructions'"),
    ]
    found = found_by(check.check_config, "finetune", tuning)
    assert {mark for mark, _ in found} == {"ok"}
    assert re.fullmatch(
        r"memory: A10G: about \d+ of 24 GB per GPU, by estimate, .*, with \d+ sequences per micro-batch", found[1][1]
    )


def test_a_start_without_weights_and_rows_that_were_never_stored_are_named(tuning):
    start = f"{tuning['START']}-elsewhere"
    (mark, what), *_ = found_by(check.check_data, "finetune", {**tuning, "START": start})
    assert (mark, what) == ("x", f"start: {start} has no checkpoint; check the name, or `make pretrain` first")
    other = {**tuning, "TRAIN_ARGS": "--data.examples=preferences"}
    assert marks(check.findings(check.check_data, task("finetune", other), other))[-1][0] == "x"


# --- memory ----------------------------------------------------------------------------------------------------


def settings_of(*arguments: str) -> training.PretrainConfig:
    return loader.load(training.PretrainConfig, [str(ROOT / "trainer/configs/gpt2-124m.yaml"), *arguments, *URLS], {})


URLS = ("--run.url=/r", "--data.url=/d")


def verdict(settings: training.PretrainConfig, gpu: str, world: int) -> tuple[bool, str] | None:
    return memory.verdict(settings, settings.model, gpu, world)


def test_every_gpu_that_a_task_names_has_a_known_memory():
    tasks = [read_task(str(path), {}) for path in (ROOT / "sky").glob("*.yaml")]
    gpus = {request.accelerator for each in tasks for request in each.requests} - {None}
    assert {"A100", "A100-80GB", "GH200", "A10G"} <= gpus
    assert [gpu for gpu in gpus if memory_bytes(gpu) is None] == []


def test_the_preset_fits_every_gpu_that_its_tasks_name():
    for gpu, world in (("A100", 8), ("A100-80GB", 8), ("A100", 2), ("GH200", 1)):
        assert verdict(settings_of(), gpu, world)[0], gpu


def test_a_model_that_fits_nowhere_asks_for_larger_gpus():
    fits, said = verdict(settings_of("--model.width=8192", "--model.heads=64", "--model.layers=64"), "A100", world=8)
    assert not fits
    assert said.endswith("take more or larger GPUs, or a smaller preset")


def test_a_micro_batch_that_is_to_be_found_is_looked_for():
    settings = settings_of("--batch.micro_batch_size=0")
    assert verdict(settings, "A10G", world=1) == (
        True,
        "A10G: about 18 of 24 GB per GPU, by estimate, not confirmed on a GPU yet, with 32 sequences per micro-batch",
    )


def test_of_an_unknown_gpu_nothing_is_said():
    assert verdict(settings_of(), "V9000", world=1) is None


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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_platforms_of_a_public_image(registry_host):
    assert registry.platforms(f"{registry_host}/me/image:1") == {"linux/amd64"}


def test_an_image_that_is_not_there_one_sentence(registry_host):
    with pytest.raises(ConfigError, match=r"cannot be read from 127\.0\.0\.1:\d+ \(HTTP 404\); push it"):
        registry.platforms(f"{registry_host}/me/image:2")


def test_an_image_for_another_architecture_is_refused(registry_host):
    settings = {"IMAGE": f"{registry_host}/me/image:1"}
    real = registry.platforms
    registry.platforms = lambda reference: real(reference.removesuffix("-train"))
    try:
        (finding,) = check.check_image(task("pretrain-gh200", settings), settings)
    finally:
        registry.platforms = real
    assert finding.mark == "x"
    assert "not for linux/arm64" in finding.what
