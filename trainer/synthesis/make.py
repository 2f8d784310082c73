"""Makes rows for fine-tuning with a large model behind an OpenAI-compatible endpoint.

`run` asks each prompt until it has the wanted number of answers, with at most `endpoint.concurrency` calls at a time.
It makes no call that could exceed the budget, and stores each answer before it goes on. At the end, it writes the
example set without duplicates, with the provenance of each row.
"""

import asyncio
import json
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from core import pulse, stop, storage
from core.console import Progress, progress
from core.data import sets
from core.errors import ConfigError, EndpointError, LauncherError
from core.exit_codes import CAPPED, OK, PREEMPTED
from core.run.folder import RunFolder
from core.run.segment import Opening, SegmentLog, open_segment
from core.settings import loader
from core.settings.tuning import SynthesisConfig
from trainer.synthesis import answers
from trainer.synthesis.answers import Prompt, StoredAnswers
from trainer.synthesis.endpoint import Budget, EndpointClient, RejectedPrompt, Reply, TransientError, host_of

log = logging.getLogger("distil")

FIRST_PAUSE_SECONDS = 1.0
GIVE_UP_AFTER = 5  # after this many prompts in a row without an answer, the endpoint counts as down
# If this many prompts are refused for an unclear reason before the first answer, the prompts are not the reason.
REFUSED_AT_FIRST = 20
DECLINED = "declined"
SCHEMA = "conversations"


def run(settings: SynthesisConfig, environment: Mapping[str, str]) -> int:
    """Returns the exit code: 0 if all prompts were asked, 34 at the end of the budget, 33 after a request to stop."""
    asked = answers.read_prompts(settings.make.prompts)
    url = settings.run.url
    source = f"written by {settings.endpoint.model}, prompts {asked.fingerprint[:12]}, run {url}"
    _check_name(settings, source)
    opening = Opening(
        stage="distil",
        config=loader.to_dict(settings),
        identity=loader.identity(settings),
        fingerprint=asked.fingerprint,
        packages=("aiohttp", "numpy", "obstore"),
        max_usd=settings.run.max_usd,
        shutdown_seconds=settings.run.shutdown_reserve_seconds,
    )
    with open_segment(RunFolder(url), opening, environment=environment) as segment:
        with segment.phase("restore"):
            stored = answers.read_answers(url)
        maker = Maker(settings, asked.prompts, stored, segment, environment.get("OPENAI_API_KEY", ""))
        log.info(
            "%d prompts, and %d duplicates of them; segment %d", len(asked.prompts), asked.duplicates, segment.number
        )
        log.info("%d answers are stored already, $%.4f spent", len(stored.rows), stored.usd)
        try:
            with segment.phase("sample"):
                asyncio.run(maker.run())
        finally:
            segment.mark("api", usd=maker.budget.spent_usd, answers=len(stored.rows))
        _write_set(settings, source, stored)
        code = maker.verdict()
        segment.close({OK: "finished", CAPPED: "cap", PREEMPTED: "preempted"}[code])
    return code


class Maker:
    """Asks the endpoint for the answers that `stored` lacks, and adds them to `stored`."""

    def __init__(
        self, settings: SynthesisConfig, asked: tuple[Prompt, ...], stored: StoredAnswers, segment: SegmentLog, key: str
    ):
        self._settings = settings
        self._stored = stored
        self._key = key
        self._prompts = asked
        self._log = answers.AnswerLog(settings.run.url, segment.number)
        self._segment = segment
        self.budget = Budget(settings.budget, stored.usd)
        self._given_up: list[str] = []
        self._unclear: dict[str, str] = {}  # refused prompts by key, with a reason that may concern all prompts
        self._warned_of_usage = False
        self._failing = 0
        self._out_of_money = self._capped = self._asked_to_stop = False
        self._failure: LauncherError | None = None

    async def run(self) -> None:
        settings = self._settings
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._stop)
        stop.inform(lambda reason: None if loop.is_closed() else loop.call_soon_threadsafe(self._stop))
        stop.allow(stop.own_seconds())
        waiting = list(self._todo())  # a list, so that a prompt declined from now on is not asked again
        todo = iter(waiting)
        life = asyncio.create_task(_show_life())
        try:
            async with EndpointClient(settings.endpoint, settings.make, self.budget, self._key) as client:
                with progress("answers", len(waiting), "answers") as bar:
                    await asyncio.gather(*(self._work(client, todo, bar) for _ in range(settings.endpoint.concurrency)))
            await self._decide_unclear()
        finally:
            life.cancel()
            self._log.close()

    def verdict(self) -> int:
        """The exit code. Raises EndpointError if the endpoint left prompts unanswered."""
        if self._failure:
            raise self._failure
        if self._given_up:
            raise EndpointError(
                f"{_host(self._settings)}: {len(self._given_up)} answers failed in "
                f"{self._settings.endpoint.attempts} calls each, the last because it {self._given_up[-1]}; all "
                "answers are stored: the same command asks for the rest"
            )
        if self._capped:
            log.warning(
                "stopped by the cap on the machines: %s; to continue, raise run.max_usd and repeat the command",
                self._segment.cap.describe(),
            )
            return CAPPED
        if self._out_of_money:
            log.warning(
                "stopped by the budget: $%.4f of $%g spent, and one more call could exceed it; to continue, raise "
                "budget.max_usd and repeat the command",
                self.budget.spent_usd,
                self.budget.max_usd,
            )
            return CAPPED
        if self._asked_to_stop:
            log.warning("asked to stop; the same command asks for the rest")
            return PREEMPTED
        if not self._stored.rows:
            raise self._no_answer()
        return OK

    def _no_answer(self) -> EndpointError:
        """The error of a run that ends without a row."""
        count = len(self._prompts)
        if self._unclear:
            return EndpointError(
                f"{_host(self._settings)}: refused {len(self._unclear)} of {count} prompts and answered none, the last "
                f"because it {list(self._unclear.values())[-1]}; these refusals are not stored: correct the cause, "
                "then run the same command; other prompts need another run.url"
            )
        return EndpointError(
            f"{_host(self._settings)}: none of {count} prompts has a usable answer ({_reasons(self._stored)}); ask "
            "declined prompts again with --make.retry_declined=true, or give other prompts or settings with another "
            "run.url"
        )

    async def _decide_unclear(self) -> None:
        """Decides about refusals that may concern all prompts.

        If another prompt got an answer, the parameters are not the reason, and the refused prompts are left out.
        """
        if self._stored.rows:
            for key in self._unclear:
                await self._settle(0.0, {"event": "left_out", "key": key, "why": DECLINED, "usd": 0.0})

    def _todo(self) -> Iterator[tuple[str, Prompt]]:
        for prompt in self._prompts:
            for number in range(self._settings.make.answers):
                key = f"{prompt.digest}/{number}"
                why = self._stored.left_out.get(key)
                again = why == DECLINED and self._settings.make.retry_declined
                if key not in self._stored.rows and (why is None or again):
                    yield key, prompt

    def _stop(self) -> None:
        log.warning("stopping after the calls in flight")
        self._asked_to_stop = True

    @property
    def _over(self) -> bool:
        if not self._capped and time.time() >= self._segment.cap.latest(self._settings.endpoint.timeout_seconds):
            self._capped = True
        return self._capped or self._asked_to_stop or self._out_of_money or self._failure is not None

    async def _work(self, client: EndpointClient, todo: Iterator[tuple[str, Prompt]], bar: Progress) -> None:
        for key, prompt in todo:
            if self._over:
                return
            try:
                await self._answer(client, key, prompt)
            except LauncherError as error:
                self._failure = self._failure or error
                return
            bar.advance(1)

    async def _answer(self, client: EndpointClient, key: str, prompt: Prompt) -> None:
        """Gets and stores one answer, or the reason why it is omitted.

        After too many failures, the answer is given up until the next start.
        """
        system = [{"role": "system", "content": self._settings.make.system}] if self._settings.make.system else []
        messages = [*system, *prompt.messages]
        most = self.budget.usd_at_most(messages, self._settings.make.max_tokens)
        why = ""
        for attempt in range(self._settings.endpoint.attempts):
            if not await self.budget.reserve(most):
                self._out_of_money = True
            if self._over:
                return
            await self._log.put({"event": "begun", "key": key, "usd": most})
            try:
                reply = await client.ask(messages)
            except TransientError as error:
                why = str(error)
                await self._settle(most, {"event": "failed", "key": key, "why": why, "usd": error.usd})
                await self._pause(attempt, error.after_seconds)
                continue
            except RejectedPrompt as error:
                await self._refused(client, key, most, error)
                return
            except LauncherError:
                await self._settle(most, {"event": "failed", "key": key, "why": "refused", "usd": 0.0})
                raise
            self._failing = 0
            await self._settle(most, self._event(key, prompt, reply, client.host))
            return
        self._given_up.append(why)
        self._failing += 1
        log.warning("an answer is given up until the next start: %s %s", client.host, why)
        if self._failing >= GIVE_UP_AFTER:
            raise EndpointError(
                f"{client.host}: {self._failing} prompts in a row got no answer in "
                f"{self._settings.endpoint.attempts} calls each, the last because it {why}; see whether it runs, then "
                "start the same command again"
            )

    async def _refused(self, client: EndpointClient, key: str, most: float, error: RejectedPrompt) -> None:
        """Leaves a prompt out. Before the first answer, a refusal for an unclear reason may concern all prompts."""
        log.warning("a prompt is left out: %s %s", client.host, error)
        if self._stored.rows or not error.unclear:
            await self._settle(most, {"event": "left_out", "key": key, "why": DECLINED, "usd": 0.0})
            return
        self._unclear[key] = str(error)
        await self._settle(most, {"event": "failed", "key": key, "why": str(error), "usd": 0.0})
        if len(self._unclear) >= REFUSED_AT_FIRST and not self._stored.rows:
            raise self._no_answer()

    async def _settle(self, reserved: float, event: Mapping[str, Any]) -> None:
        await self._log.put(event)
        self._stored.add(event)
        await self.budget.settle(reserved, event["usd"])

    async def _pause(self, attempt: int, after_seconds: float | None) -> None:
        """Waits as long as the endpoint asks. If it does not ask, the wait has exponential backoff and jitter."""
        longest = self._settings.endpoint.max_wait_seconds
        backoff = FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.0)
        deadline = time.monotonic() + min(longest, backoff if after_seconds is None else after_seconds)
        while not self._over and (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))

    def _event(self, key: str, prompt: Prompt, reply: Reply, host: str) -> dict[str, Any]:
        why = None
        if reply.input_tokens is None and not self._warned_of_usage:
            self._warned_of_usage = True
            log.warning("%s: answers without `usage`; each answer is counted at its maximum cost", host)
        if reply.finish == "length":
            why = "cut off at max_tokens"
        elif reply.finish == "content_filter":
            why = DECLINED
        elif not reply.text.strip():
            why = "empty"
        if why:
            return {"event": "left_out", "key": key, "why": why, "usd": reply.usd}
        made, omitted = self._settings.make, self._settings.endpoint.omit
        sampling = {name: None if name in omitted else getattr(made, name) for name in ("temperature", "top_p")}
        provenance = {
            "model": reply.model,
            "endpoint": host,
            "prompt_sha256": prompt.digest,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "parameters": {**sampling, "max_tokens": made.max_tokens, "system": made.system},
            "input_tokens": reply.input_tokens,
            "output_tokens": reply.output_tokens,
        }
        messages = [*prompt.messages, {"role": "assistant", "content": reply.text.strip()}]
        return {
            "event": "answer",
            "key": key,
            "usd": reply.usd,
            "row": {"messages": messages, "provenance": provenance},
        }


async def _show_life() -> None:
    """Show the supervisor of a node that this program waits for answers. Each call and each pause has a time limit."""
    while True:
        pulse.beat()
        await asyncio.sleep(pulse.EVERY_SECONDS)


def _host(settings: SynthesisConfig) -> str:
    return host_of(settings.endpoint.url)


def _check_name(settings: SynthesisConfig, source: str) -> None:
    """Raises ConfigError if a set with this name from another source exists, because it would be overwritten."""
    made = settings.make
    if storage.exists(storage.join(made.url, "sets", f"{made.name}.json")):
        there = sets.info_of(made.url, made.name).source
        if there != source:
            raise ConfigError(f"make.name: {made.url} holds a set {made.name!r} already ({there}); choose another name")


def _reasons(stored: StoredAnswers) -> str:
    """The reasons for omitted answers, counted."""
    return ", ".join(f"{count} {why}" for why, count in sorted(Counter(stored.left_out.values()).items())) or "none"


def _write_set(settings: SynthesisConfig, source: str, stored: StoredAnswers) -> None:
    """Writes the rows in the order of their keys, so that the same answers give the same set."""
    made = settings.make
    seen: set[str] = set()
    lines = []
    for _, row in sorted(stored.rows.items()):
        digest = answers.digest_of(row["messages"])
        if digest not in seen:
            seen.add(digest)
            lines.append(json.dumps(row) + "\n")
    duplicates = len(stored.rows) - len(lines)
    log.info("%d rows, %d duplicates left out; other answers left out: %s", len(lines), duplicates, _reasons(stored))
    if lines:
        info = sets.write(made.url, made.name, SCHEMA, source, made.licence, "".join(lines).encode())
        log.info("stored as %s/sets/%s.jsonl, SHA-256 %s", made.url, made.name, info.sha256[:12])
