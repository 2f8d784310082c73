"""Rows for fine-tuning, written by a large model behind an OpenAI-compatible endpoint.

Each prompt is asked until it has its answers, at most `endpoint.concurrency` at a time. No call is made that could
cost more than what is left of the budget. What is paid for is stored before anything else happens; the set is put
together at the end, without duplicates, each row with where it is from.
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
from urllib.parse import urlsplit

from core import stop, storage
from core.console import Progress, progress
from core.data import sets
from core.errors import ConfigError, EndpointError, LauncherError
from core.exit_codes import CAPPED, OK, PREEMPTED
from core.run.folder import RunFolder
from core.run.segment import Opening, open_segment
from core.settings import loader
from core.settings.tuning import SynthesisConfig
from trainer.synthesis import kept, prompts
from trainer.synthesis.endpoint import Declined, Endpoint, Passing, Prices, Purse, Reply
from trainer.synthesis.prompts import Prompt, digest_of

log = logging.getLogger("distil")

FIRST_PAUSE_SECONDS = 1.0
GIVE_UP_AFTER = 5  # prompts in a row without any answer: the endpoint is down
SCHEMA = "conversations"


def run(settings: SynthesisConfig, environment: Mapping[str, str]) -> int:
    """Returns the exit code: 0 when every prompt was asked, 34 at the end of the budget, 33 when asked to stop."""
    asked = prompts.read(settings.make.prompts)
    url = settings.run.url
    source = f"written by {settings.endpoint.model}, prompts {asked.fingerprint[:12]}, run {url}"
    _check_name(settings, source)
    opening = Opening(
        stage="distil",
        config=loader.to_dict(settings),
        identity=loader.identity(settings),
        fingerprint=asked.fingerprint,
        packages=("aiohttp", "numpy", "obstore"),
    )
    with open_segment(RunFolder(url), opening, environment=environment) as segment:
        with segment.phase("restore"):
            known = kept.read(url)
        maker = Maker(settings, asked.prompts, known, segment.number, environment.get("OPENAI_API_KEY", ""))
        log.info(
            "%d prompts, and %d duplicates of them; segment %d", len(asked.prompts), asked.duplicates, segment.number
        )
        log.info("%d answers are there from before, $%.4f spent", len(known.rows), known.usd)
        try:
            with segment.phase("sample"):
                asyncio.run(maker.run())
        finally:
            segment.mark("api", usd=maker.purse.spent_usd, answers=len(known.rows))
        _write_set(settings, source, known)
        code = maker.verdict()
        segment.close({OK: "finished", CAPPED: "cap", PREEMPTED: "preempted"}[code])
    return code


class Maker:
    """Asks for what is not in `known` yet, and adds it there."""

    def __init__(self, settings: SynthesisConfig, asked: tuple[Prompt, ...], known: kept.Known, segment: int, key: str):
        self._settings = settings
        self._known = known
        self._key = key
        self._prices = Prices(settings.budget)
        self._prompts = asked
        self._keeper = kept.Keeper(settings.run.url, segment)
        self.purse = Purse(settings.budget.max_usd, known.usd)
        self._given_up: list[str] = []
        self._failing = 0
        self._out_of_money = self._asked_to_stop = False
        self._failure: LauncherError | None = None

    async def run(self) -> None:
        settings = self._settings
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._stop)
        stop.inform(lambda reason: None if loop.is_closed() else loop.call_soon_threadsafe(self._stop))
        stop.allow(stop.own_seconds())
        todo = self._todo()
        total = len(self._prompts) * settings.make.answers
        done = len(self._known.rows) + len(self._known.left_out)
        try:
            async with Endpoint(settings.endpoint, settings.make, self._prices, self._key) as endpoint:
                with progress("answers", total - done, "answers") as bar:
                    await asyncio.gather(
                        *(self._work(endpoint, todo, bar) for _ in range(settings.endpoint.concurrency))
                    )
        finally:
            self._keeper.close()

    def verdict(self) -> int:
        """Raises EndpointError if prompts are left that the endpoint did not answer."""
        if self._failure:
            raise self._failure
        if self._given_up:
            raise EndpointError(
                f"{_host(self._settings)}: {len(self._given_up)} answers were not given in "
                f"{self._settings.endpoint.attempts} calls each, the last because it {self._given_up[-1]}; what came "
                "is stored; the same command asks for the rest"
            )
        if self._out_of_money:
            log.warning(
                "stopped by the budget: $%.4f of $%g spent, and one more call could exceed it; go on with a larger "
                "budget.max_usd and the same command",
                self.purse.spent_usd,
                self.purse.max_usd,
            )
            return CAPPED
        if self._asked_to_stop:
            log.warning("asked to stop; the same command asks for the rest")
            return PREEMPTED
        return OK

    def _todo(self) -> Iterator[tuple[str, Prompt]]:
        for prompt in self._prompts:
            for number in range(self._settings.make.answers):
                key = f"{prompt.digest}/{number}"
                if key not in self._known.rows and key not in self._known.left_out:
                    yield key, prompt

    def _stop(self) -> None:
        log.warning("stopping: calls in flight are waited for")
        self._asked_to_stop = True

    @property
    def _over(self) -> bool:
        return self._asked_to_stop or self._out_of_money or self._failure is not None

    async def _work(self, endpoint: Endpoint, todo: Iterator[tuple[str, Prompt]], bar: Progress) -> None:
        for key, prompt in todo:
            if self._over:
                return
            try:
                await self._answer(endpoint, key, prompt)
            except LauncherError as error:
                self._failure = self._failure or error
                return
            bar.advance(1)

    async def _answer(self, endpoint: Endpoint, key: str, prompt: Prompt) -> None:
        """One answer, or its being left out, in the books; or given up for now."""
        system = [{"role": "system", "content": self._settings.make.system}] if self._settings.make.system else []
        messages = [*system, *prompt.messages]
        most = self._prices.most(messages, self._settings.make.max_tokens)
        why = ""
        for attempt in range(self._settings.endpoint.attempts):
            if not await self.purse.set_aside(most):
                self._out_of_money = True
            if self._over:
                return
            await self._keeper.put({"event": "begun", "key": key, "usd": most})
            try:
                reply = await endpoint.ask(messages)
            except Passing as error:
                why = str(error)
                await self._settle(most, {"event": "failed", "key": key, "why": why, "usd": error.usd})
                await self._pause(attempt, error.after_seconds)
                continue
            except Declined as error:
                await self._settle(most, {"event": "left_out", "key": key, "why": "declined", "usd": 0.0})
                log.warning("a prompt is left out: %s %s", endpoint.host, error)
                return
            except ConfigError:
                await self._settle(most, {"event": "failed", "key": key, "why": "refused", "usd": 0.0})
                raise
            self._failing = 0
            await self._settle(most, self._event(key, prompt, reply, endpoint.host))
            return
        self._given_up.append(why)
        self._failing += 1
        log.warning("an answer is given up for now: %s %s", endpoint.host, why)
        if self._failing >= GIVE_UP_AFTER:
            raise EndpointError(
                f"{endpoint.host}: {self._failing} prompts in a row got no answer in "
                f"{self._settings.endpoint.attempts} calls each, the last because it {why}; see whether it is up, then "
                "start the same command again"
            )

    async def _settle(self, aside: float, event: Mapping[str, Any]) -> None:
        await self._keeper.put(event)
        self._known.take(event)
        await self.purse.settle(aside, event["usd"])

    async def _pause(self, attempt: int, after_seconds: float | None) -> None:
        """What the endpoint asks for, else twice as long each time, with jitter."""
        longest = self._settings.endpoint.max_wait_seconds
        backoff = FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.0)
        deadline = time.monotonic() + min(longest, backoff if after_seconds is None else after_seconds)
        while not self._over and (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))

    def _event(self, key: str, prompt: Prompt, reply: Reply, host: str) -> dict[str, Any]:
        why = None
        if reply.finish == "length":
            why = "cut off at max_tokens"
        elif reply.finish == "content_filter" or not reply.text.strip():
            why = "empty"
        if why:
            return {"event": "left_out", "key": key, "why": why, "usd": reply.usd}
        made = self._settings.make
        provenance = {
            "model": reply.model,
            "endpoint": host,
            "prompt_sha256": prompt.digest,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "parameters": {
                "temperature": made.temperature,
                "top_p": made.top_p,
                "max_tokens": made.max_tokens,
                "system": made.system,
            },
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


def _host(settings: SynthesisConfig) -> str:
    return urlsplit(settings.endpoint.url).netloc


def _check_name(settings: SynthesisConfig, source: str) -> None:
    """A set of that name must be ours, for it will be written again."""
    made = settings.make
    if storage.exists(storage.join(made.url, "sets", f"{made.name}.json")):
        there = sets.info_of(made.url, made.name).source
        if there != source:
            raise ConfigError(f"make.name: {made.url} holds a set {made.name!r} already ({there}); choose another name")


def _write_set(settings: SynthesisConfig, source: str, known: kept.Known) -> None:
    """In the order of the keys, so that the same answers make the same set."""
    made = settings.make
    seen: set[str] = set()
    lines = []
    for _, row in sorted(known.rows.items()):
        digest = digest_of("\n".join(f"{each['role']}: {each['content']}" for each in row["messages"]))
        if digest not in seen:
            seen.add(digest)
            lines.append(json.dumps(row) + "\n")
    duplicates = len(known.rows) - len(lines)
    reasons = ", ".join(f"{count} {why}" for why, count in sorted(Counter(known.left_out.values()).items()))
    log.info("%d rows, %d duplicates left out; other answers left out: %s", len(lines), duplicates, reasons or "none")
    if lines:
        info = sets.write(made.url, made.name, SCHEMA, source, made.licence, "".join(lines).encode())
        log.info("stored as %s/sets/%s.jsonl, SHA-256 %s", made.url, made.name, info.sha256[:12])
