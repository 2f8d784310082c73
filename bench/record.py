"""What every recorded result begins with: when, on which machine, with which versions.

results = record.header("gigatoken", "pyarrow") | {"runs": runs}
"""

import os
import platform
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
