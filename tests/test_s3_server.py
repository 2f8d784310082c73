"""The S3 server of demo, tests and benchmarks."""

from pathlib import Path

from demo import s3_server
from demo.s3_server import S3Server


def test_ports_that_another_server_took_are_given_up(s3: S3Server, tmp_path: Path, monkeypatch):
    """Its ports were free when it looked for them, and a server that started at the same moment listens on them."""
    free = s3_server._free_ports
    asked = []

    def free_ports(count: int) -> list[int]:
        asked.append(count)
        return free(count) if len(asked) > 1 else [*free(count)[:6], s3.port, *free(count)[7:]]

    monkeypatch.setattr(s3_server, "_free_ports", free_ports)
    with S3Server(tmp_path / "s3") as server:
        assert server.port != s3.port
        server.make_bucket("mine")
        assert server.has_bucket("mine")
    assert len(asked) == 2
    assert not s3.has_bucket("mine")
