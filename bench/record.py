"""What every measurement begins with: when, on which machine, with which versions, and pages that are there.

results = record.header("gigatoken", "pyarrow") | {"runs": runs}
"""

import mmap
import os
import platform
from datetime import date
from typing import Any

from core.run.machine import program_versions


def header(*packages: str) -> dict[str, Any]:
    """Date, machine, and the versions of these packages as far as they are installed."""
    return {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "versions": {name: version for name, version in program_versions(packages).items() if name in packages},
    }


def touch_pages(size: int) -> None:
    """Use `size` bytes of memory once and give them back, before a side that is about to need them.

    On a virtual machine whose free pages go back to the host, the first use of a page costs ten times a later one,
    which says nothing of any side. Not by a file: its pages would be on their way to the disk while the side runs.
    """
    with mmap.mmap(-1, size) as pages:
        for begin in range(0, size, mmap.PAGESIZE):
            pages[begin] = 1
