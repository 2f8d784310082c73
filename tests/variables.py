"""The environment variables that .env.example and docs/environment.md list, in order."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def in_example() -> list[str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return [line.partition("=")[0] for line in lines if line and not line.startswith("#")]


def in_document() -> list[str]:
    """Names in the first column of the tables."""
    rows = re.findall(r"^\| (`[A-Z].*?) \|", (ROOT / "docs/environment.md").read_text(), re.M)
    return [name for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row)]
