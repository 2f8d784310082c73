"""Export as its users call it: model card, refusals, and publishing to a bucket and to a Hub."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from core import storage
from core.errors import ConfigError
from core.exit_codes import CAPPED
from core.run.folder import RunFolder
from core.run.journal import Journal
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import read_run
from tests import models, warm
from tests.patience import PATIENCE_SECONDS
from trainer import export
from trainer.checkpoint import layout
from trainer.evals import suite
from trainer.weights.card import thinned
from trainer.weights.open import open_weights

REPOSITORY = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    return models.prepare_data(tmp_path_factory.mktemp("data"), vocab_bpe)


@pytest.fixture(scope="module")
def run_url(tmp_path_factory, data_url) -> str:
    """A checkpoint of step 0, and the books of two segments that led to it, by the code that keeps them."""
    url = str(tmp_path_factory.mktemp("runs") / "first")
    models.make_run(url, data_url)
    machine = Machine(usd_per_hour=36_000.0)  # ten dollars a second
    for first in (1, 21):
        books = Ledger(RunFolder(url), machine, {}, started_at=None)
        metrics = Journal(RunFolder(url).segment(books.segment).metrics)
        for step in range(first, first + 30):
            metrics.add({"kind": "train", "time": 0.0, "step": step, "loss": 10 - step / 10 - first / 1000})
        metrics.add({"kind": "eval", "time": 0.0, "step": first + 29, "val_loss": 5.0 + first, "eval_tokens": 1})
        metrics.close()
        books.close("finished", 50)
    return url


def at_step(run_url: str, step: int) -> None:
    """The checkpoint again, as if of that step."""
    manifest = layout.read_manifest(run_url, 0, layout.stored(run_url)[0])
    for file in manifest.files:
        data = storage.read_bytes(storage.join(layout.folder_of(run_url, 0), file.name))
        storage.write_bytes(storage.join(layout.folder_of(run_url, step), file.name), data)
    state = manifest.state | {"step": step, "tokens": step * 1000}
    layout.write_marker(run_url, layout.CheckpointManifest(step, 0, manifest.files, state))


def test_the_model_card_says_what_the_run_has_recorded(run_url, tmp_path):
    at_step(run_url, 40)
    opened = open_weights(f"{run_url}/checkpoints/step-00000040", torch.device("cpu"))
    scores = {"items": 7, "accuracy": 0.25, "accuracy_stderr": 0.125}
    suite.store_result(suite.results_folder(opened, ""), "hellaswag-00000000", {"task": "hellaswag", "scores": scores})
    export.main([f"{run_url}/checkpoints/step-00000040", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    front, _, rest = card.removeprefix("---\n").partition("---\n")
    assert "library_name: transformers" in front
    assert rest.startswith("\n# first\n")
    parameters = sum(tensor.numel() for tensor in opened.model.parameters()) - 47 * 32
    assert f"GPT2LMHeadModel, {parameters:,} parameters, float32" in card
    assert "47 rows that padded it in training are removed" in card
    assert "40 steps, 40,000 tokens" in card
    # Steps 21 to 30 were done twice: the later one counts; what came after step 40 belongs to another checkpoint.
    assert f"| 40 | {10 - 4 - 0.021:.4f} |  |" in card
    assert "| 30 | 6.9790 | 6.0000 |" in card
    assert "| 50 |" not in card
    assert "![loss over steps](loss.png)" in card
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "| hellaswag | accuracy | 0.2500 | 0.1250 |" in card
    assert "- train: " in card
    assert "training: $" in card
    assert "2 segments" in card
    assert str(tmp_path) not in card


def test_about_so_many_points_with_the_last():
    assert thinned([1, 2, 3], 5) == [1, 2, 3]
    assert thinned(list(range(100)), 4) == [24, 49, 74, 99]


def test_nothing_is_overwritten_and_nothing_begun_in_vain(run_url, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ConfigError, match=r"full: holds 1 objects already, such as precious; name a new folder"):
        export.main([run_url, str(tmp_path / "full")])
    with pytest.raises(ConfigError, match=r"full: holds 1 objects already"):
        export.main([run_url, str(tmp_path / "new"), f"--publish={tmp_path / 'full'}"])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"publish: hf:me/mine needs HF_TOKEN"):
        export.main([run_url, str(tmp_path / "new"), "--publish=hf:me/mine"])
    with pytest.raises(ConfigError, match=r"publish: hf:mine is not of the form hf:OWNER/NAME"):
        export.main([run_url, str(tmp_path / "new"), "--publish=hf:mine"])
    with pytest.raises(ConfigError, match=r"give a model and a folder, not 1 names"):
        export.main([run_url])
    with pytest.raises(ConfigError, match=r"format is 'ggml', must be one of huggingface, gguf"):
        export.main([run_url, str(tmp_path / "new"), "--format=ggml"])
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]


def test_to_a_bucket_and_back(run_url, bucket: str, tmp_path):
    export.main([run_url, str(tmp_path / "out"), f"--publish={bucket}/model"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {info.name for info in storage.list_objects(f"{bucket}/model")} == names
    there, here = (open_weights(where, torch.device("cpu")) for where in (f"{bucket}/model", run_url))
    for name, values in there.model.named_parameters():
        assert torch.equal(values, here.model.get_parameter(name)[: len(values)])
    assert there.encoding.encode_ordinary("a b") == here.encoding.encode_ordinary("a b")


# --- a Hub ---------------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the Hub does where a repository is made, committed to and read from."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()
        self.refuses = False
        self.cuts = False


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/resolve/" in path:
            self._file(path.rsplit("/", 1)[-1])
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in sorted(self.server.files.items())
            ]
            self._json(entries)
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in sorted(self.server.files)]
            self._json({"id": "me/mine", "sha": COMMIT, "siblings": siblings})
        else:
            self._json({"error": "Entry not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._body()
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            self._json({"error": "You don't have the rights"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._json({"url": f"http://{self.headers['Host']}/me/mine", "name": "me/mine", "id": "me/mine"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self._json({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/mine/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        else:  # validate-yaml
            self._json({"errors": [], "warnings": []})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _file(self, name: str) -> None:
        if name not in self.server.files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = self.server.files[name]
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        cut = data[first : len(data) // 2] if self.server.cuts and self.command == "GET" else data[first:]
        self._send(cut, len(data) - first, 206 if first else 200, headers)

    def _json(self, document: object, status: int = 200, headers: dict | None = None) -> None:
        data = json.dumps(document).encode()
        self._send(data, len(data), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, stated: int, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(stated), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if len(data) < stated and self.command == "GET":
            self.close_connection = True


@pytest.fixture
def hub():
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`: pip install huggingface-hub")
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def call(hub: Hub, tmp_path: Path, module: str, *arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": "3"}
    command = [sys.executable, "-m", module, *arguments]
    done = warm.run(command, cwd=REPOSITORY, env=environment, timeout=PATIENCE_SECONDS)
    assert "hf_secret" not in done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_published_on_the_hub_and_read_by_name(hub: Hub, run_url, data_url, tmp_path):
    done = call(hub, tmp_path, "trainer.export", run_url, str(tmp_path / "out"), "--publish=hf:me/mine")
    assert done.returncode == 0, done.stderr
    assert f"/me/mine/commit/{COMMIT}" in done.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == hub.files
    [created] = hub.created
    assert (created["name"], created["organization"]) == ("mine", "me")
    assert created.get("visibility") == "private" or created.get("private") is True
    assert hub.tokens == {"Bearer hf_secret"}
    # And by its name it comes back as a run, bit by bit.
    done = call(hub, tmp_path, "trainer.import_weights", "hf:me/mine", str(tmp_path / "run"), f"--data.url={data_url}")
    assert done.returncode == 0, done.stderr
    back, here = (open_weights(where, torch.device("cpu")) for where in (str(tmp_path / "run"), run_url))
    for name, values in back.model.named_parameters():
        assert torch.equal(values, here.model.get_parameter(name)[: len(values)])
    assert back.state["origin"] == "hf:me/mine"


def test_a_hub_that_refuses_is_one_sentence(hub: Hub, run_url, tmp_path):
    hub.refuses = True
    done = call(hub, tmp_path, "trainer.export", run_url, str(tmp_path / "out"), "--publish=hf:me/mine")
    assert done.returncode == 1
    assert "error: hf:me/mine: the Hub refused: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "config.json").exists()  # the export itself is done


@pytest.mark.slow  # the Hub's client tries again and again
def test_a_download_that_is_cut_off_is_one_sentence(hub: Hub, run_url, data_url, tmp_path):
    export.main([run_url, str(tmp_path / "out")])
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    hub.cuts = True
    done = call(hub, tmp_path, "trainer.import_weights", "hf:me/mine", str(tmp_path / "run"), f"--data.url={data_url}")
    assert done.returncode == 1
    assert "error: hf:me/mine: cannot be downloaded: " in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_export_of_a_run_is_stored_below_it_with_its_dollars_and_can_be_resumed(run_url, monkeypatch):
    """As on a rented machine: the launcher sets RUN_URL, and the price."""
    monkeypatch.setenv("RUN_URL", run_url)
    monkeypatch.setenv("USD_PER_HOUR", "36")
    monkeypatch.setattr("core.run.segment.process_started_at", time.time)
    step = layout.complete_steps(run_url)[0]
    target = Path(RunFolder(run_url).exports) / f"step-{step:08d}-huggingface-bfloat16"
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"a part of an upload")
    assert export.main(["--dtype=bfloat16", "--max_usd=5"]) == 0
    assert json.loads((target / "config.json").read_text())["model_type"]
    assert (target / "model.safetensors").stat().st_size > 1000
    run = read_run(RunFolder(run_url).exports)
    assert (run.stage, run.segments[-1].end["reason"]) == ("export", "finished")
    assert sum(span.phases.get("export", 0) for span in run.segments[-1].spans) > 0
    # Another export begins only below the cap.
    monkeypatch.setattr("core.run.cap.SpendingCap.latest", lambda *_: 0.0)
    assert export.main(["--dtype=float16", "--max_usd=0.0001"]) == CAPPED
    assert not target.with_name(f"step-{step:08d}-huggingface-float16").exists()
    assert read_run(RunFolder(run_url).exports).segments[-1].end["reason"] == "cap"
