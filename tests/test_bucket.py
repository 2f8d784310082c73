"""BUCKET, RUN and DATA in every form that people type: one place for nodes, make, pull, logs, status and reports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import bucket, storage
from core.errors import ConfigError
from costs.discover import runs_url

ROOT = Path(__file__).parent.parent
FORMS = {
    ("my-bucket", "a"): "s3://my-bucket/runs/a",
    ("my-bucket/", "a"): "s3://my-bucket/runs/a",
    ("s3://my-bucket", "a"): "s3://my-bucket/runs/a",
    ("s3://my-bucket/", "a"): "s3://my-bucket/runs/a",
    ("s3://my-bucket//", "a"): "s3://my-bucket/runs/a",
    ("S3://my-bucket", "a"): "s3://my-bucket/runs/a",
    ("  my-bucket\n", " a "): "s3://my-bucket/runs/a",
    ("my-bucket", "a/"): "s3://my-bucket/runs/a",
    ("my-bucket", "/a"): "s3://my-bucket/runs/a",
    ("my-bucket", "team/a"): "s3://my-bucket/runs/team/a",
    ("my-bucket/team", "a"): "s3://my-bucket/team/runs/a",
    ("s3://my-bucket/team/x/", "a"): "s3://my-bucket/team/x/runs/a",
    ("gs://b/", "a"): "gs://b/runs/a",
    ("/data/here/", "a"): "/data/here/runs/a",
    ("file:///data/here", "a"): "file:///data/here/runs/a",
}


def of_a_node(given: str, name: str) -> str:
    """As launch/node/container.sh asks for it."""
    environment = {**os.environ, "BUCKET": given, "RUN": name}
    command = [sys.executable, "-S", "-m", "launch.node.place", "RUN"]  # -S: a node's Python has none of our packages
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize(("given", "url"), FORMS.items())
def test_every_form_names_one_place(given, url):
    settings = dict(zip(("BUCKET", "RUN"), given, strict=True))
    assert bucket.url(settings, "RUN") == url
    assert of_a_node(*given) == url
    assert storage.join(runs_url(settings), bucket.name(settings, "RUN")) == url


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("s3:/my-bucket", "did you mean s3://my-bucket?"),
        ("s3:my-bucket", "did you mean s3://my-bucket?"),
        ("GS:/b/team", "did you mean gs://b/team?"),
        ("s3//my-bucket/x", "did you mean s3://my-bucket/x?"),
        ("s3://", "names no bucket"),
        ("b/../c", "must not hold the parts . or .."),
        ("b\x1b[0m", "must not hold control characters"),
        (" ", "BUCKET is empty; give BUCKET=NAME"),
    ],
)
def test_what_is_no_bucket_is_refused_with_its_spelling_on_both_sides(given, said):
    with pytest.raises(ConfigError) as problem:
        bucket.root({"BUCKET": given})
    assert said in str(problem.value)
    assert said in of_a_node(given, "a")


@pytest.mark.parametrize("name", ["../other", "a/../b", ".", "", "s3://b/runs/a", "a\rb", "x" * 600])
def test_a_run_is_a_folder_of_runs(name):
    with pytest.raises(ConfigError, match=r"^RUN (is|has) "):
        bucket.url({"BUCKET": "b", "RUN": name}, "RUN")


def test_a_url_that_is_given_loses_what_was_copied_with_it():
    assert bucket.url({"RUN_URL": " s3://b/runs/a\r\n", "BUCKET": "other"}, "RUN") == "s3://b/runs/a"
    assert bucket.url({"DATA_URL": " \r", "BUCKET": "b", "DATA": "d"}, "DATA") == "s3://b/data/d"
    with pytest.raises(ConfigError, match=r"^RUN_URL is .* must not hold control characters"):
        bucket.url({"RUN_URL": "s3://b/a\rb"}, "RUN")
