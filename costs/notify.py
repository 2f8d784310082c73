"""Sends messages about runs to the addresses in NOTIFY_URLS, by the package apprise: mail, ntfy, Slack, a web server.

`cost_report.py --watch` and `--serve` look at runs periodically, and send what has changed since the previous look. The
first look only records the state and sends nothing.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core import figures, secrets
from core.environment import positive
from core.errors import ConfigError, LauncherError, one_line
from costs.report import FINAL, CostReport
from costs.top import name_of

log = logging.getLogger("costs")
SHARES = (0.5, 0.8, 1.0)  # of the cap
SILENT_MINUTES = 15.0
SMALLEST_LOOK_SECONDS = 0.2

Send = Callable[[str, str], None]  # a title and a text
Look = Callable[[], list[CostReport]]


def sender(environment: Mapping[str, str] = os.environ) -> Send | None:
    """A function that sends messages to the addresses in NOTIFY_URLS, which are separated by spaces or commas.

    None if there are no addresses. Raises ConfigError for an address that apprise does not know, and if apprise is not
    installed.
    """
    urls = environment.get("NOTIFY_URLS", "").replace(",", " ").split()
    if not urls:
        return None
    try:
        import apprise
    except ImportError:
        raise ConfigError("NOTIFY_URLS needs the package apprise; run `pip install apprise`, or unset it") from None
    service = apprise.Apprise()
    for number, url in enumerate(urls, 1):
        secrets.register(url)
        if not service.add(url):
            raise ConfigError(
                f"NOTIFY_URLS: apprise does not know the form of address {number} of {len(urls)}; examples: "
                "ntfy://TOPIC, json://HOST:PORT/PATH, mailto://USER:PASSWORD@HOST"
            )

    def send(title: str, text: str) -> None:
        try:
            if not service.notify(title=title, body=text):
                log.warning("notification not delivered: %s", title)
        except Exception as error:  # a failing service must not end the program that watches a run
            log.warning("notification not delivered: %s (%s)", title, secrets.scrub(one_line(error)))

    return send


@dataclass
class Watched:
    """Sends the changes of each run since the previous look. Does nothing if `send` is None."""

    send: Send | None
    silent_minutes: float = SILENT_MINUTES
    _before: dict[str, CostReport] = field(default_factory=dict)
    _silent: set[str] = field(default_factory=set)

    @classmethod
    def by_environment(cls, environment: Mapping[str, str] = os.environ) -> "Watched":
        """Makes a Watched from the environment's variables. Raises ConfigError."""
        return cls(sender(environment), positive(environment, "NOTIFY_SILENT_MINUTES") or SILENT_MINUTES)

    def look(self, report: CostReport, now: float) -> None:
        if self.send is None:
            return
        before = self._before.get(report.run)
        self._before[report.run] = report
        if before is None:
            if _silent_seconds(report, now) > 60 * self.silent_minutes:
                self._silent.add(report.run)
            return
        for text in changes(before, report):
            self.send(name_of(report.run), f"{text} ({report.run})")
        silent = _silent_seconds(report, now)
        if silent <= 60 * self.silent_minutes:
            self._silent.discard(report.run)
        elif report.run not in self._silent:
            self._silent.add(report.run)
            self.send(name_of(report.run), f"silent for {figures.duration(silent)} ({report.run})")


def changes(before: CostReport, after: CostReport) -> list[str]:
    """A text for each change between two reports on a run, in order."""
    found = []
    ends = {line.name: line.end for line in before.segments}
    for line in after.segments:
        known = ends.get(line.name)
        if known is None and line.restored_step is not None:
            found.append(f"resumed from step {line.restored_step:,}: segment {line.name} on {line.machine}")
        elif known is None and line is not after.segments[0]:
            found.append(f"goes on: segment {line.name} on {line.machine}")
        if line.end != known and (line.end == "preempted" or line.end.startswith("killed")):
            found.append(f"{line.end.partition(' ')[0]}: segment {line.name}, at ${_spent(after)}")
    found += [
        f"${_spent(after)} spent, {100 * share:.0f} % of ${figures.dollars(after.about.cap_usd)}"
        for share in SHARES
        if _share(before, after) < share <= _share(after, after)
    ][-1:]
    if after.state != before.state and after.state in FINAL:
        loss = "" if after.units.val_loss is None else f", validation loss {after.units.val_loss:.4f}"
        found.append(f"{after.state} at step {after.units.last_step or 0:,}{loss}, ${_spent(after)}")
    return found


def _share(report: CostReport, newest: CostReport) -> float:
    """A report's dollars as a share of the newest cap. 0 if the dollars or the cap are unknown."""
    cap = newest.about.cap_usd
    return (report.total.usd or 0.0) / cap if cap else 0.0


def _spent(report: CostReport) -> str:
    return figures.dollars(report.total.usd, report.places, report.total.complete)


def _silent_seconds(report: CostReport, now: float) -> float:
    """Seconds since the last heartbeat of a run that should continue."""
    over = report.state in FINAL or report.about.ended_at is None
    return 0.0 if over else now - report.about.ended_at


def keep_looking(
    watched: Watched, reports: Callable[[], list[CostReport]], every: float, ended: threading.Event
) -> None:
    """Look at all runs every `every` seconds in a thread, until `ended` is set.

    If the store does not answer, the thread tries again at the next look.
    """

    def work() -> None:
        while not ended.wait(max(every, SMALLEST_LOOK_SECONDS)):
            try:
                for report in reports():
                    watched.look(report, time.time())
            except LauncherError as error:
                log.warning("runs cannot be read at present: %s", error)

    if watched.send:
        threading.Thread(target=work, name="notify", daemon=True).start()
