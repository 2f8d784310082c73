"""Empty is absent, .env in all dialects, and no key in what is printed."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import environment, secrets
from core.console import set_up_logging
from core.data import manifest
from core.errors import ConfigError
from core.run.folder import RunFolder, open_run
from tests import variables
from tests.test_manifest import GOOD

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"BUCKET=my-bucket  # mine\n", {"BUCKET": "my-bucket"}),
        (b'BUCKET="my-bucket" # mine\n', {"BUCKET": "my-bucket"}),
        (b"BUCKET = my-bucket\n", {"BUCKET": "my-bucket"}),
        (b"export  BUCKET=my-bucket\nexport\tRUN=a\n", {"BUCKET": "my-bucket", "RUN": "a"}),
        (b"BUCKET=my-bucket\r\nRUN=a\r\n", {"BUCKET": "my-bucket", "RUN": "a"}),
        (b"\xef\xbb\xbf# of the team\nBUCKET=my-bucket", {"BUCKET": "my-bucket"}),
        (b"\xef\xbb\xbfBUCKET=my-bucket\n", {"BUCKET": "my-bucket"}),
        (b"RUN_TAGS='a b # c'\n", {"RUN_TAGS": "a b # c"}),
        (b"AWS_SECRET_ACCESS_KEY=ab#cd/ef+gh=\n", {"AWS_SECRET_ACCESS_KEY": "ab#cd/ef+gh="}),
        (b"MAX_USD=$20\n", {"MAX_USD": "$20"}),
        (b"RUN=a\nRUN=b\n", {"RUN": "b"}),
        (b"BUCKET=\nRUN=a\n", {"RUN": "a"}),
        (b"", {}),
    ],
)
def test_dotenv_in_every_dialect(tmp_path, content, found):
    (tmp_path / ".env").write_bytes(content)
    assert environment.with_dotenv({}, tmp_path / ".env") == found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("BUCKET=b\n".encode("utf-16"), "is not UTF-8 text; save it again as UTF-8"),
        ("RUN_TAGS=café\n".encode("latin-1"), "is not UTF-8 text"),
        (b"BUCKET=b\n\nnot a line\n", ":3: is not a NAME=value line"),
        (b"BUCKET=b\nWANDB_API_KEY='never-closed\n", ":2: is not a NAME=value line"),
        (b"RUN=a\0b\n", ":1: RUN holds a NUL character"),
    ],
)
def test_a_dotenv_that_cannot_be_read_gets_one_sentence_without_a_value(tmp_path, content, said):
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(ConfigError) as problem:
        environment.with_dotenv({}, tmp_path / ".env")
    assert said in str(problem.value)
    assert "never-closed" not in str(problem.value)


def test_the_shell_wins_over_the_file_but_not_with_an_empty_value(tmp_path):
    file = tmp_path / ".env"
    file.write_text("BUCKET=from-file\nRUN=from-file\nMAX_USD=5\n")
    given = {"BUCKET": "from-shell", "RUN": "", "AWS_ENDPOINT_URL": "", "NO_COLOR": "", "CUDA_VISIBLE_DEVICES": ""}
    assert environment.with_dotenv(given, file) == {
        "BUCKET": "from-shell",
        "RUN": "from-file",
        "MAX_USD": "5",
        "NO_COLOR": "",
        "CUDA_VISIBLE_DEVICES": "",  # empty means something: no GPU
    }


ENDPOINTS = """
from core import environment
environment.adopt()
import boto3
for service in ("s3", "ec2", "sts", "service-quotas"):
    print(boto3.client(service).meta.endpoint_url)
"""


def test_a_copied_env_example_leaves_libraries_alone(tmp_path):
    """botocore would ask s3..amazonaws.com for the region "", and not look into the user's profile."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_access_key_id = test\naws_secret_access_key = test\n")
    (tmp_path / ".aws/config").write_text("[default]\nregion = us-west-2\n")
    example = (ROOT / ".env.example").read_text()
    (tmp_path / ".env").write_text(example.replace("\nBUCKET=\n", "\nBUCKET=my-bucket\n"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    empty = dict.fromkeys([*variables.in_example(), *variables.in_document()], "")
    for shell in ({}, empty):  # as a file, and as `set -a; . ./.env` leaves it in the shell
        given = {**shell, **kept, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", ENDPOINTS], cwd=tmp_path, env=given, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [
            "https://s3.us-west-2.amazonaws.com",
            "https://ec2.us-west-2.amazonaws.com",
            "https://sts.us-west-2.amazonaws.com",
            "https://servicequotas.us-west-2.amazonaws.com",
        ]


def test_every_empty_variable_that_a_library_reads_is_dropped():
    """What stays is read by our own programs alone, for which empty is absent."""
    given = dict.fromkeys([*variables.in_example(), *variables.in_document()], "")
    environment.drop_empty(given)
    assert {"AWS_DEFAULT_REGION", "GOOGLE_APPLICATION_CREDENTIALS", "XDG_CACHE_HOME", "RANK"} & set(given) == set()
    assert {"BUCKET", "MAX_USD"} <= set(given)


# --- keys ------------------------------------------------------------------------------------------------------

FAILS = """
import os
from core import secrets
from core.console import run_entry
from core.errors import StorageError

def main(arguments):
    secrets.register("from-a-file-0123456789")
    kind = {"ours": StorageError, "other": ValueError}[arguments[0]]
    raise kind(f"bad header {os.environ['WANDB_API_KEY']} {b'Bearer from-a-file-0123456789!'!r}")

run_entry(main)
"""


@pytest.mark.parametrize("kind", ["ours", "other"])
def test_no_key_in_an_error_of_ours_or_in_a_traceback(kind):
    given = {**os.environ, "WANDB_API_KEY": "0f" * 20}
    done = subprocess.run([sys.executable, "-c", FAILS, kind], cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 1
    assert "bad header *** b'Bearer ***!'" in done.stderr
    assert ("Traceback" in done.stderr) == (kind == "other")
    assert "0f0f" not in done.stderr
    assert "0123456789" not in done.stderr


def test_words_of_everyday_are_no_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    assert secrets.scrub("this is a test") == "this is a test"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/v1 failed", "https://***@host/v1 failed"),
        ("postgresql+psycopg2://u:p%40@db:5432/x", "postgresql+psycopg2://***@db:5432/x"),
        ("GET https://h/v1?api-key=abcdef&b=2", "GET https://h/v1?api-key=***&b=2"),
        (
            "https://h/o?X-Amz-Credential=A%2F1&X-Amz-Signature=0f0f",
            "https://h/o?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        ("'Authorization': 'Bearer abcdefgh1'", "'Authorization': 'Bearer ***'"),
        ("x-api-key: 0123456789", "x-api-key: ***"),
        ("Incorrect API key provided: sk-abcd****wxyz.", "Incorrect API key provided: ***."),
        ("s3://bucket/runs/first@2, step 3: no key = no run", "s3://bucket/runs/first@2, step 3: no key = no run"),
        ("send Authorization: Bearer KEY", "send Authorization: Bearer KEY"),
    ],
)
def test_what_has_the_form_of_a_secret_is_hidden(text, shown):
    assert secrets.scrub(text) == shown
    assert secrets.without_keys({"a": [text, 1, None], "b": (text,)}) == {"a": [shown, 1, None], "b": [shown]}


def test_hiding_takes_no_longer_for_a_text_that_is_almost_a_secret():
    for part in ("://", "a.", "?key", "bearer ", "authorization ", "?" + "a" * 50):
        text = part * (100_000 // len(part))
        assert len(secrets.scrub(text)) >= len(text) / 10


def test_a_log_line_has_no_key_and_no_escape(capsys):
    set_up_logging()
    try:
        logging.getLogger("x").warning("no answer: %s \x1b]0;owned\x07", "https://me:pass@host/?token=abc")
        try:
            raise ValueError("Authorization: Bearer abcdefgh1")
        except ValueError:
            logging.getLogger("x").exception("it failed")
    finally:
        logging.basicConfig(force=True)
    said = capsys.readouterr().err
    assert "no answer: https://***@host/?token=*** \\x1b]0;owned\\x07" in said
    assert "ValueError: Authorization: Bearer ***" in said


def test_no_key_in_a_url_is_stored_with_a_run(tmp_path):
    url = "https://me:pass@host/v1?api-key=abcdef"
    run = RunFolder(str(tmp_path))
    assert open_run(run, {"source.url": url}, {"endpoint": {"url": url}}, "f")
    text = (tmp_path / "run.json").read_text()
    assert text.count("https://***@host/v1?api-key=***") == 2
    assert not open_run(run, {"source.url": url}, {}, "f"), "the same run, with the same key"
    assert "pass" not in manifest.Manifest(GOOD.tokenizer, {"url": url}, {}, GOOD.splits).to_bytes().decode()
