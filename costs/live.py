"""Renders the pages that `--serve` keeps up to date: an overview, a run, a comparison."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from costs import compare, page
from costs.report import RUNNING, CostReport

SCRIPT = Path(__file__).with_name("live.js").read_text(encoding="utf-8")
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# The browser runs only this project's script, and the script may send requests only to this server.
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{_HASH}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'"
)
BACK = '<p class="crumbs"><a href="/">All runs</a></p>'


@dataclass(frozen=True)
class Page:
    """A page's title, and the parts of its body."""

    title: str
    body: Sequence[str]


def of_run(report: CostReport, is_one_of_many: bool = False) -> Page:
    return Page(f"Cost of {report.run}", [BACK if is_one_of_many else "", *page.of_run(report)])


def of_all(reports: Sequence[CostReport]) -> Page:
    """All runs, each with a link to its page and a box that selects it for a comparison."""
    ordered = compare.newest_first(reports)
    running = sum(report.state == RUNNING for report in ordered)
    button = '<p><button type="submit">Compare the chosen runs</button></p>'
    sheet, groups = compare.overview(ordered), compare.overview_groups(ordered)
    table = page.table(sheet, [report.run for report in ordered])
    body = [
        "<h1>Runs</h1>",
        f'<p class="lead">{len(ordered)} in this bucket, {running} running</p>',
        f'<form action="/compare">{page.section(sheet.title, table + button, "runs")}</form>',
        page.section(groups.title, page.table(groups)) if groups.rows else "",
    ]
    return Page("Costs of runs", body)


def of_comparison(reports: Sequence[CostReport]) -> Page:
    return Page("Comparison of runs", [BACK, *page.of_comparison(reports)])


def of_problem(sentence: str, is_one_of_many: bool = False) -> Page:
    """A page with one sentence that says why there is nothing to show."""
    back = BACK if is_one_of_many else ""
    return Page("Costs of runs", [back, "<h1>Nothing to show</h1>", f"<p>{escape(sentence)}</p>"])


def tag_of(shown: Page) -> str:
    """A fingerprint of a page's content."""
    return '"' + hashlib.sha256("\n".join(shown.body).encode()).hexdigest()[:20] + '"'


def as_html(shown: Page, every: float, now: float) -> str:
    footer = page.footer(now, f'<span id="seen">read just now</span>, again every {every:g} s. ')
    root = f'data-every="{every:g}" data-tag="{escape(tag_of(shown))}"'
    return page.document(shown.title, shown.body, POLICY, root, f"{footer}<script>{SCRIPT}</script>")
