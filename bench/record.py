"""What every measurement begins with: when, on which machine, with which versions, and pages that are there.

results = record.header("gigatoken", "pyarrow") | {"runs": runs}
"""

import os
import platform
import tempfile
from datetime import date
from typing import Any

from core.run import program_versions


def header(*packages: str) -> dict[str, Any]:
    """Date, machine, and the versions of these packages as far as they are installed."""
    return {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "versions": {name: version for name, version in program_versions(packages).items() if name in packages},
    }


def touch_pages(size: int) -> None:
    """Write and remove a file of `size` bytes, for the page cache that a side is about to fill.

    On a virtual machine whose free pages go back to the host, the first use of a page costs ten times a later one,
    which says nothing of any side.
    """
    with tempfile.TemporaryFile() as pages:
        for _ in range(0, size, 1 << 23):
            pages.write(bytes(1 << 23))
