"""Answers the lines of a chat and runs its commands, which begin with a slash."""

import dataclasses
import difflib
import itertools
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import torch

from core import storage
from core.data import chat_template
from core.errors import ConfigError, LauncherError
from trainer.inference.chat_model import ChatModel, open_chat_model
from trainer.inference.engine import Engine, GenerationRequest, Piece
from trainer.inference.sampling import InferenceOptions, Sampling, changed
from trainer.inference.terminal import Interrupt, Terminal

PROMPT_TOKENS, NEW_TOKENS = 256, 32  # length of /bench's prompts and answers
BATCH_SIZES = (1, 8)
PATIENCE_SECONDS = 60.0  # /bench skips a batch size that would take longer


class ChatSession:
    """The conversation with one model, or the texts that a base model continued."""

    def __init__(self, model: ChatModel):
        self.model = model
        self.messages: list[dict[str, str]] = []
        self.texts: list[dict[str, str]] = []

    def request(self, line: str, system: str, sampling: Sampling) -> tuple[GenerationRequest, int]:
        """The request for a line, and the number of old messages left out. ConfigError if the line is too long."""
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
        """Handles one line. Returns False if the chat is to end. Errors are shown and do not end it."""
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
        """OTHER | off: let another model answer beside this one, or stop that"""
        if not rest:
            raise ConfigError("/compare: no model; write /compare RUN_OR_CHECKPOINT, or /compare off")
        if rest == "off":
            del self._sessions[1:]
            self._terminal.note("no comparison")
            return
        other = open_chat_model(rest, self._options)
        if other.tuned != self._tuned:
            self._terminal.note("one model answers in turns, the other continues text: each gets lines in its format")
        self._sessions[1:] = [ChatSession(other)]
        self._terminal.note(
            f"comparing with {other.name}, opened in {other.opened_seconds:.1f} s; both start a new conversation"
        )
        self._sessions[0] = ChatSession(self._sessions[0].model)

    def do_bench(self, _: str) -> None:
        """: measure this machine: tokens per second, memory"""
        for session in self._sessions:
            engine = session.model.engine
            rows = []
            with self._terminal.waiting("measuring"):
                for found in measure_speed(engine):
                    size = f"{found.batch_size} x {found.prompt_tokens} + {found.new_tokens}"
                    rows.append((size, f"{found.prefill:,.0f}", f"{found.decode:,.1f}"))
                used = measure_memory(engine)
            self._terminal.note(
                f"{session.model.name} on {engine.device.type}, {str(engine.dtype).removeprefix('torch.')}"
            )
            self._terminal.table(["texts x prompt + new", "prefill tokens/s", "decode tokens/s"], rows)
            self._terminal.note(
                f"memory: weights {used.weights_bytes / 1e6:,.1f} MB, cache {used.cache_bytes / 1e3:,.1f} kB per token "
                f"of a text, peak {used.peak_bytes / 1e6:,.0f} MB"
            )

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
    """Yields (stream, piece), one piece of each stream in turn, until all streams end."""
    for pieces in itertools.zip_longest(*streams):
        yield from ((index, piece) for index, piece in enumerate(pieces) if piece is not None)


def _settings() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(Sampling)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return "none" if value is None else str(value)


def _usage(name: str, text: str) -> tuple[str, str]:
    takes, _, does = text.partition(": ")
    return f"/{name} {takes}".strip(), does


# --- /bench ------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Tokens per second of the whole batch: `prefill` of prompts, `decode` of new tokens, including sampling."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float


class Memory(NamedTuple):
    """`cache_bytes`: KV cache per token of one text. `peak_bytes`: torch's peak on a GPU, else the process's peak."""

    weights_bytes: int
    cache_bytes: int
    peak_bytes: int


def measure_speed(engine: Engine) -> Iterator[Speed]:
    """Yields one result per batch size, after a warm-up round. Uses a separate engine on the same model."""
    prompt_tokens = min(PROMPT_TOKENS, engine.context // 2)
    new_tokens = min(NEW_TOKENS, engine.context - prompt_tokens)
    _round(engine, 1, prompt_tokens, new_tokens)
    seconds = 0.0
    for batch_size in BATCH_SIZES:
        if seconds * batch_size > PATIENCE_SECONDS:
            return
        start = time.monotonic()
        yield _round(engine, batch_size, prompt_tokens, new_tokens)
        seconds = time.monotonic() - start


def measure_memory(engine: Engine) -> Memory:
    config = engine.model.config
    weights = sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters())
    cache = 2 * config.layers * config.width * engine.dtype.itemsize
    if engine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(engine.device)
    else:
        # ru_maxrss is in kilobytes on Linux and in bytes on macOS (getrusage(2)).
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(weights, cache, peak)


def _round(engine: Engine, batch_size: int, prompt_tokens: int, new_tokens: int) -> Speed:
    fresh = Engine(engine.model, engine.encoding, engine.device, engine.precision, batch_size)
    source = random.Random(0)
    sampling = Sampling(max_tokens=new_tokens, seed=0)
    for _ in range(batch_size):
        prompt = [source.randrange(engine.vocabulary) for _ in range(prompt_tokens)]
        fresh.add(GenerationRequest(prompt, sampling, endless=True))
    start = time.monotonic()
    read = 0
    while fresh.waiting:  # each of these steps processes prompts and waits for their tokens
        read += len(fresh.step())
    middle = time.monotonic()
    written = 0
    while fresh.busy:
        written += len(fresh.step())
    return Speed(
        batch_size,
        prompt_tokens,
        new_tokens,
        read * prompt_tokens / (middle - start),
        written / (time.monotonic() - middle),
    )
