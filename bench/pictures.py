"""Makes the pictures of the cost page and of the terminal for docs/, from the run that `make demo` has left in .demo.

    make demo && python -m bench.pictures [--demo=.demo]

The page needs a Chromium on PATH. Pictures go to docs/images.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bench.harness import REPOSITORY
from demo.run import RUN_URL
from demo.s3_server import S3Server

IMAGES = REPOSITORY / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLUMNS = 92  # of the terminal
# The file's name, the width and height of the window in pixels, and whether the page is dark.
PAGES = (
    ("cost-report-light", 1080, 1500, False),
    ("cost-report-dark", 1080, 1500, True),
    ("cost-report-phone", 390, 1500, False),
    ("cost-report-tablet", 768, 1500, False),
    ("cost-report-wide", 1440, 1500, True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=REPOSITORY / ".demo", help="folder that `make demo` has filled")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is on PATH; install Chromium")
    if not (options.demo / "s3").is_dir():
        raise SystemExit(f"{options.demo / 's3'}: not found; run `make demo` first, or name its folder with --demo")
    with S3Server(options.demo / "s3") as server, tempfile.TemporaryDirectory() as folder:
        environment = os.environ | server.environment() | {"COST_CACHE_DIR": f"{folder}/costs"}
        page = Path(folder, "report.html")
        report([f"--html={page}"], environment)
        for name, width, height, is_dark in PAGES:
            photograph(browser, page, IMAGES / f"{name}.png", width, height, is_dark)
        print_to_pdf(browser, page, IMAGES / "cost-report-print.pdf")
        terminal(report([], environment | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}), IMAGES / "terminal.svg")


def report(flags: list[str], environment: dict[str, str]) -> str:
    """The output of the cost report on the demo's run."""
    command = [sys.executable, str(REPOSITORY / "cost_report.py"), RUN_URL, "--offline", *flags]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def photograph(browser: str, page: Path, target: Path, width: int, height: int, is_dark: bool) -> None:
    """Stores a picture of the upper part of a page in a window of this size."""
    flags = [f"--window-size={width},{height}", f"--screenshot={target}"]
    if is_dark:
        flags.append("--blink-settings=preferredColorScheme=0")
    browse(browser, page, target, flags)


def print_to_pdf(browser: str, page: Path, target: Path) -> None:
    """Stores a picture of a page as it is printed on paper."""
    browse(browser, page, target, [f"--print-to-pdf={target}", "--no-pdf-header-footer"])


def browse(browser: str, page: Path, target: Path, flags: list[str]) -> None:
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    always += [f"--user-data-dir={page.parent / target.stem}", "--virtual-time-budget=2000"]
    subprocess.run([browser, *always, *flags, page.as_uri()], check=True, capture_output=True, timeout=300)
    print(f"wrote {target.relative_to(REPOSITORY)}")


def terminal(printed: str, target: Path) -> None:
    """Stores the output of a program, with its colours, as a picture of a terminal."""
    lines = printed.splitlines()
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(f"[bold]$ python cost_report.py {RUN_URL}[/bold]")
    for line in lines[: next((n for n, line in enumerate(lines) if "Unit costs" in line), len(lines))]:
        console.print(Text.from_ansi(line), overflow="crop", no_wrap=True)
    console.save_svg(str(target), title="make demo")
    print(f"wrote {target.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
