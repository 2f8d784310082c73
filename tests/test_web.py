"""core.web and its users: no caller waits forever for a server that never ends its answer."""

import re
from pathlib import Path

import pytest

from core import web
from core.stores.aws import Place
from launch.node import preflight
from tests.fake_metadata import metadata_service
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parent.parent
TROUBLE = ("drip of headers", "drip with a length", "drip without", "cut", "no HTTP")


@pytest.mark.parametrize("kind", TROUBLE)
def test_an_answer_that_does_not_end_is_an_error(kind):
    with metadata_service() as (service, environment):
        service.trouble.append(kind)
        with pytest.raises(OSError, match=r"^no complete answer "):
            web.fetch(environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"], 0.5)


def test_a_whole_answer_is_returned_and_a_refusal_raised():
    with metadata_service() as (service, environment):
        service.trouble += ["says hello", "403"]
        headers, body = web.fetch(environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"], PATIENCE_SECONDS)
        assert headers["Date"]
        assert body == b"hello"
        with pytest.raises(OSError, match=r"^HTTP Error 403"):
            web.fetch(environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"], PATIENCE_SECONDS)


@pytest.mark.parametrize("kind", TROUBLE)
def test_without_the_servers_clock_a_node_is_not_judged_by_it(kind, monkeypatch):
    monkeypatch.setattr(preflight, "CLOCK_SECONDS", 0.5)
    with metadata_service() as (service, environment):
        service.trouble.append(kind)
        url = environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"]
        assert preflight.clock_skew_seconds({"BUCKET_ENDPOINT_URL": url}) is None


def test_a_date_that_is_none_is_no_clock(monkeypatch):
    monkeypatch.setattr(web, "fetch", lambda *_: ({"Date": "soon"}, b""))
    assert preflight.clock_skew_seconds({}) is None
    monkeypatch.setattr(web, "fetch", lambda *_: ({"Date": "Mon, 30 Nov 2026 12:00:00 GMT"}, b""))
    monkeypatch.setattr(preflight.time, "time", lambda: 1_796_040_060.0)
    assert preflight.clock_skew_seconds({}) == 60.0


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_bucket_whose_server_does_not_end_its_answer_has_no_known_region(kind, monkeypatch):
    monkeypatch.setattr("core.stores.aws.LOOK_UP_SECONDS", 0.5)
    with metadata_service() as (service, environment):
        service.do_HEAD = service.do_GET
        service.trouble.append(kind)
        assert Place("b", environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"], None).home() is None


def test_every_request_has_a_limit_for_the_whole_answer():
    """These files send requests of their own: the limit itself, what runs without our packages, and a metadata client
    whose limit test_watch.py tests."""
    own = {"core/web.py", "launch/node/switch.py", "clouds/metadata.py"}
    folders = ("core", "clouds", "data_prep", "trainer", "costs", "launch")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    sends = {str(path.relative_to(ROOT)) for path in files if re.search(r"urlopen|HTTPS?Connection", path.read_text())}
    assert sends == own
