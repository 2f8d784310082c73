"""Answers the lines of a chat and runs its commands, which begin with a slash."""

import dataclasses
import difflib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing

from core import storage
from core.data import chat_template
from core.errors import ConfigError, LauncherError
from core.settings.inference import InferenceOptions, Sampling
from trainer.inference import speed
from trainer.inference.chat_model import ChatModel, open_chat_model
from trainer.inference.engine import GenerationRequest, Piece
from trainer.inference.sampling import changed
from trainer.inference.terminal import Interrupt, Terminal

CACHE_PROMPT = "The most important thing about"  # the line that /compare uses in an empty conversation
CACHE_TOKENS = 64  # /compare generates at most this many new tokens


class ChatSession:
    """The conversation with a fine-tuned model, or the texts that a base model has continued."""

    def __init__(self, model: ChatModel):
        self.model = model
        self.messages: list[dict[str, str]] = []
        self.texts: list[dict[str, str]] = []

    def request(self, line: str, system: str, sampling: Sampling) -> tuple[GenerationRequest, int]:
        """The request for a line, and the number of old messages that were left out.

        Raises ConfigError if the line is too long.
        """
        if not self.model.tuned:
            return GenerationRequest(self.model.engine.encode(line), sampling), 0
        messages = [{"role": "system", "content": system}] if system.strip() else []
        messages += [*self.messages, {"role": "user", "content": line}]
        tokens, left_out = self.model.recent(messages, sampling)
        stop = (*sampling.stop, *chat_template.STOP)
        return GenerationRequest(tokens, dataclasses.replace(sampling, stop=stop)), left_out

    def remember(self, line: str, answer: str) -> None:
        self.texts.append({"prompt": line, "text": answer})
        if answer.strip():  # a conversation cannot contain an empty turn
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


class Chat:
    """A chat with one model, or with two that answer side by side."""

    def __init__(self, model: ChatModel, sampling: Sampling, options: InferenceOptions, terminal: Terminal):
        self._sessions = [ChatSession(model)]
        self._sampling = sampling
        self._system = ""
        self._options = options
        self._terminal = terminal
        self.failed = False

    def handle(self, line: str) -> bool:
        """Handles one line. Returns False if the chat is to end. An error is shown and does not end the chat."""
        try:
            if not line.strip():
                return True
            if not line.startswith("/"):
                self._answer(line)
                return True
            name, _, rest = line[1:].strip().partition(" ")
            return self._command(name)(rest.strip()) is not False
        except LauncherError as error:
            self._terminal.error(str(error))
            self.failed = True
        except KeyboardInterrupt:
            self._terminal.note("stopped")
        return True

    @classmethod
    def commands(cls) -> dict[str, str]:
        """Arguments and purpose of each command, by name."""
        found = {name: value for name, value in vars(cls).items() if name.startswith("do_")}
        return {name.removeprefix("do_"): value.__doc__ for name, value in found.items()}

    def do_help(self, _: str) -> None:
        """: list the commands"""
        self._terminal.table(
            ["command", "what it does"], [_usage(name, text) for name, text in self.commands().items()]
        )
        self._terminal.note("Ctrl-C stops an answer; Ctrl-D ends the chat. A line without a slash goes to the model.")

    def do_set(self, rest: str) -> None:
        """[KEY VALUE]: change a setting, or show them all"""
        key, _, value = rest.partition(" ")
        if not key:
            values = dataclasses.asdict(self._sampling)
            rows = [(field.name, _shown(values[field.name]), field.metadata["help"]) for field in _settings()]
            if self._tuned:
                rows.append(("system", self._system or "none", "system message at the start of the conversation"))
            self._terminal.table(["setting", "value", "meaning"], rows)
        elif key == "system" and self._tuned:
            self._system = "" if value.strip() == "none" else value.strip()
            self._terminal.note(f"system is {self._system or 'none'}")
        else:
            if not value.strip():
                raise ConfigError(f"/set {key}: no value; write /set {key} VALUE")
            self._sampling = changed(self._sampling, key, value, "/set")
            self._terminal.note(f"{key} is {_shown(getattr(self._sampling, key))}")

    def do_compare(self, rest: str) -> None:
        """[OTHER | off]: compare with another model, or stop comparing; no argument: time the KV cache on and off"""
        if not rest:
            self._compare_cache()
            return
        if rest == "off":
            del self._sessions[1:]
            self._terminal.note("no comparison")
            return
        other = open_chat_model(rest, self._options)
        if other.tuned != self._tuned:
            self._terminal.note("one model answers messages, the other continues text: each gets lines in its format")
        self._sessions[1:] = [ChatSession(other)]
        self._terminal.note(
            f"comparing with {other.name}, opened in {other.opened_seconds:.1f} s; both start a new conversation"
        )
        self._sessions[0] = ChatSession(self._sessions[0].model)

    def do_bench(self, rest: str) -> None:
        """[PROMPT]: measure tokens per second and memory on this machine, or the speed of three answers to PROMPT"""
        if rest:
            self._bench_prompt(rest)
            return
        for session in self._sessions:
            engine = session.model.engine
            rows = []
            with self._terminal.waiting("measuring"):
                for found in speed.measure_speed(engine):
                    size = f"{found.batch_size} x {found.prompt_tokens} + {found.new_tokens}"
                    rows.append((size, f"{found.prefill:,.0f}", f"{found.decode:,.1f}"))
                used = speed.measure_memory(engine)
            self._terminal.note(
                f"{session.model.name} on {engine.device.type}, {str(engine.dtype).removeprefix('torch.')}"
            )
            self._terminal.table(["texts x prompt + new", "prefill tokens/s", "decode tokens/s"], rows)
            self._terminal.note(
                f"memory: weights {used.weights_bytes / 1e6:,.1f} MB, cache {used.cache_bytes / 1e3:,.1f} kB per token "
                f"of a text, peak {used.peak_bytes / 1e6:,.0f} MB"
            )

    def _bench_prompt(self, line: str) -> None:
        """Answer a line ROUNDS times and show the speed of each answer and the mean.

        The answers do not join the conversation.
        """
        for session in self._sessions:
            request, _ = session.request(line, self._system, self._sampling)
            with self._terminal.waiting("measuring"):
                runs = [speed.timed(session.model.engine, request) for _ in range(speed.ROUNDS)]
            rows = [(str(number), *_speed(run.tokens, run.seconds)) for number, run in enumerate(runs, 1)]
            means = [statistics.mean(getattr(run, name) for run in runs) for name in ("tokens", "seconds")]
            self._terminal.note(f"{session.model.name}: {len(request.tokens)} tokens of prompt")
            self._terminal.table(["run", "new tokens", "seconds", "tokens/s"], [*rows, ("mean", *_speed(*means))])

    def _compare_cache(self) -> None:
        """Answer the newest line, or CACHE_PROMPT if there is none, once with and once without the KV cache."""
        for session in self._sessions:
            lines = [each["prompt"] for each in session.texts]
            sampling = dataclasses.replace(
                self._sampling, seed=self._sampling.seed or 0, max_tokens=min(self._sampling.max_tokens, CACHE_TOKENS)
            )
            request, _ = session.request(lines[-1] if lines else CACHE_PROMPT, self._system, sampling)
            with self._terminal.waiting("measuring"):
                speed.timed(session.model.engine, request)  # a warm-up
                kept, again = (speed.timed(session.model.engine, request, caches) for caches in (True, False))
            rows = [(name, *_speed(run.tokens, run.seconds)) for name, run in (("on", kept), ("off", again))]
            self._terminal.note(f"{session.model.name}: {len(request.tokens)} tokens of prompt")
            self._terminal.table(["KV cache", "new tokens", "seconds", "tokens/s"], rows)
            times = kept.tokens_per_second / again.tokens_per_second if again.tokens and kept.tokens else math.nan
            same = "the same text" if kept.text == again.text else "another text, because of rounding"
            self._terminal.note(f"with the cache {times:.1f} times as fast; {same}")

    def do_save(self, rest: str) -> None:
        """FILE: store the conversation as JSONL (local, s3://, gs://, az://)"""
        if not rest:
            raise ConfigError("/save: no file; write /save FILE")
        lines = []
        for session in self._sessions:
            about = {"model": session.model.name, "sampling": dataclasses.asdict(self._sampling)}
            if session.model.tuned and session.messages:
                system = [{"role": "system", "content": self._system}] if self._system else []
                lines.append({"messages": [*system, *session.messages], **about})
            elif not session.model.tuned:
                lines += [{**text, **about} for text in session.texts]
        if not lines:
            raise ConfigError(f"/save {rest}: the conversation is empty")
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        storage.write_bytes(rest, data, exclusive=True)
        self._terminal.note(f"{len(lines)} lines in {rest}")

    def do_new(self, _: str) -> None:
        """: start a new conversation"""
        self._sessions = [ChatSession(session.model) for session in self._sessions]
        self._terminal.note("a new conversation")

    def do_quit(self, _: str) -> bool:
        """: end the chat"""
        return False

    @property
    def _tuned(self) -> bool:
        return self._sessions[0].model.tuned

    def _command(self, name: str) -> Callable[[str], bool | None]:
        if name not in self.commands():
            near = difflib.get_close_matches(name, self.commands(), n=1)
            raise ConfigError(f"unknown command /{name}; " + (f"did you mean /{near[0]}?" if near else "try /help"))
        return getattr(self, f"do_{name}")

    def _answer(self, line: str) -> None:
        requests = []
        for session in self._sessions:
            request, left_out = session.request(line, self._system, self._sampling)
            requests.append(request)
            if left_out:
                self._terminal.note(f"the first {left_out} messages do not fit the context and are left out")
        names = [session.model.name for session in self._sessions]
        prompts = ["" if session.model.tuned else line for session in self._sessions]
        answers, count, finish = ["" for _ in self._sessions], 0, None
        start = time.monotonic()
        with ExitStack() as stack:
            interrupt = stack.enter_context(Interrupt())
            streams = [
                stack.enter_context(closing(session.model.engine.stream([request])))
                for session, request in zip(self._sessions, requests, strict=True)
            ]
            show = stack.enter_context(self._terminal.answers(names, prompts))
            for index, piece in _in_turn(streams):
                answers[index] += piece.text
                count += piece.token is not None
                finish = piece.finish or finish
                show(index, piece.text)
                if interrupt.asked:
                    finish = "stopped"
                    break
        seconds = time.monotonic() - start
        self._terminal.aside(f"{count} tokens in {seconds:.1f} s, {count / seconds:,.1f} tokens/s, {finish}")
        for session, answer in zip(self._sessions, answers, strict=True):
            session.remember(line, answer)


def _in_turn(streams: Sequence[Iterable[Piece]]) -> Iterable[tuple[int, Piece]]:
    """Yields pairs (stream, piece). The streams take turns, a piece at a time, until all of them have ended."""
    for pieces in itertools.zip_longest(*streams):
        yield from ((index, piece) for index, piece in enumerate(pieces) if piece is not None)


def _settings() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(Sampling)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return "none" if value is None else str(value)


def _speed(tokens: float, seconds: float) -> tuple[str, str, str]:
    return f"{tokens:,.0f}", f"{seconds:.2f}", f"{tokens / seconds:,.1f}"


def _usage(name: str, text: str) -> tuple[str, str]:
    takes, _, does = text.partition(": ")
    return f"/{name} {takes}".strip(), does
