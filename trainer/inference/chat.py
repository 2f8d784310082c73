"""What a chat does with a line: an answer, or a command that begins with a slash."""

import dataclasses
import difflib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing

from core import storage
from core.errors import ConfigError, LauncherError
from trainer.data import chat_template
from trainer.inference import speed
from trainer.inference.chat_model import Speaker, open_speaker
from trainer.inference.engine import Piece, Request
from trainer.inference.sampling import Machine, Sampling, changed
from trainer.inference.terminal import Face, Interrupt


class Side:
    """One checkpoint's part: its conversation, or the texts that it continued."""

    def __init__(self, speaker: Speaker):
        self.speaker = speaker
        self.messages: list[dict[str, str]] = []
        self.texts: list[dict[str, str]] = []

    def request(self, line: str, system: str, sampling: Sampling) -> tuple[Request, int]:
        """What to ask, and how many old messages no longer fit. Raises ConfigError for what is too long."""
        if not self.speaker.tuned:
            return Request(self.speaker.engine.encode(line), sampling), 0
        messages = [{"role": "system", "content": system}] if system.strip() else []
        messages += [*self.messages, {"role": "user", "content": line}]
        tokens, left_out = self.speaker.recent(messages, sampling)
        stop = (*sampling.stop, *chat_template.STOP)
        return Request(tokens, dataclasses.replace(sampling, stop=stop)), left_out

    def remember(self, line: str, answer: str) -> None:
        self.texts.append({"prompt": line, "text": answer})
        if answer.strip():  # a turn without words cannot be part of a conversation
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


class Chat:
    """`handle` one line after the other until it says that this was the last."""

    def __init__(self, speaker: Speaker, sampling: Sampling, machine: Machine, face: Face):
        self._sides = [Side(speaker)]
        self._sampling = sampling
        self._system = ""
        self._machine = machine
        self._face = face
        self.failed = False

    def handle(self, line: str) -> bool:
        """False when it is time to go. An error is told and does not end the chat."""
        try:
            if not line.strip():
                return True
            if not line.startswith("/"):
                self._answer(line)
                return True
            name, _, rest = line[1:].strip().partition(" ")
            return self._command(name)(rest.strip()) is not False
        except LauncherError as error:
            self._face.error(str(error))
            self.failed = True
        except KeyboardInterrupt:
            self._face.note("stopped")
        return True

    @classmethod
    def commands(cls) -> dict[str, str]:
        """Name → what it takes and does."""
        found = {name: value for name, value in vars(cls).items() if name.startswith("do_")}
        return {name.removeprefix("do_"): value.__doc__ for name, value in found.items()}

    def do_help(self, _: str) -> None:
        """: list the commands"""
        self._face.table(["command", "what it does"], [_usage(name, text) for name, text in self.commands().items()])
        self._face.note("Ctrl-C stops an answer; Ctrl-D ends the chat. Anything without a slash is for the model.")

    def do_set(self, rest: str) -> None:
        """[KEY VALUE]: change a setting, or show them all"""
        key, _, value = rest.partition(" ")
        if not key:
            values = dataclasses.asdict(self._sampling)
            rows = [(field.name, _shown(values[field.name]), field.metadata["help"]) for field in _settings()]
            if self._tuned:
                rows.append(("system", self._system or "none", "what the conversation begins with, as the system"))
            self._face.table(["setting", "value", "meaning"], rows)
        elif key == "system" and self._tuned:
            self._system = "" if value.strip() == "none" else value.strip()
            self._face.note(f"system is {self._system or 'none'}")
        else:
            if not value.strip():
                raise ConfigError(f"/set {key}: no value; write /set {key} VALUE")
            self._sampling = changed(self._sampling, key, value, "/set")
            self._face.note(f"{key} is {_shown(getattr(self._sampling, key))}")

    def do_compare(self, rest: str) -> None:
        """OTHER | off: let another checkpoint answer beside this one, or no longer"""
        if not rest:
            raise ConfigError("/compare: which one? write /compare RUN_OR_CHECKPOINT, or /compare off")
        if rest == "off":
            del self._sides[1:]
            self._face.note("no comparison")
            return
        other = open_speaker(rest, self._machine)
        if other.tuned != self._tuned:
            self._face.note("one of them knows turns, the other only continues text: each is asked in its own way")
        self._sides[1:] = [Side(other)]
        self._face.note(f"comparing with {other.name}, opened in {other.opened_seconds:.1f} s; both begin anew")
        self._sides[0] = Side(self._sides[0].speaker)

    def do_bench(self, _: str) -> None:
        """: measure this machine: tokens per second, memory"""
        for side in self._sides:
            engine = side.speaker.engine
            rows = []
            with self._face.waiting("measuring"):
                for found in speed.measure(engine):
                    size = f"{found.rows} x {found.prompt_tokens} + {found.new_tokens}"
                    rows.append((size, f"{found.prefill:,.0f}", f"{found.decode:,.1f}"))
                used = speed.memory(engine)
            self._face.note(f"{side.speaker.name} on {engine.device.type}, {str(engine.dtype).removeprefix('torch.')}")
            self._face.table(["texts x prompt + new", "prefill tokens/s", "decode tokens/s"], rows)
            self._face.note(
                f"memory: weights {used.weights_bytes / 1e6:,.1f} MB, cache {used.cache_bytes / 1e3:,.1f} kB per token "
                f"of a text, peak {used.peak_bytes / 1e6:,.0f} MB"
            )

    def do_save(self, rest: str) -> None:
        """FILE: keep what was said as JSONL (local, s3://, gs://, az://)"""
        if not rest:
            raise ConfigError("/save: where? write /save FILE")
        lines = []
        for side in self._sides:
            about = {"model": side.speaker.name, "sampling": dataclasses.asdict(self._sampling)}
            if side.speaker.tuned and side.messages:
                system = [{"role": "system", "content": self._system}] if self._system else []
                lines.append({"messages": [*system, *side.messages], **about})
            elif not side.speaker.tuned:
                lines += [{**text, **about} for text in side.texts]
        if not lines:
            raise ConfigError(f"/save {rest}: nothing was said yet")
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        storage.write_bytes(rest, data, exclusive=True)
        self._face.note(f"{len(lines)} lines in {rest}")

    def do_new(self, _: str) -> None:
        """: forget what was said"""
        self._sides = [Side(side.speaker) for side in self._sides]
        self._face.note("a new beginning")

    def do_quit(self, _: str) -> bool:
        """: end the chat"""
        return False

    @property
    def _tuned(self) -> bool:
        return self._sides[0].speaker.tuned

    def _command(self, name: str) -> Callable[[str], bool | None]:
        if name not in self.commands():
            near = difflib.get_close_matches(name, self.commands(), n=1)
            raise ConfigError(f"unknown command /{name}; " + (f"did you mean /{near[0]}?" if near else "try /help"))
        return getattr(self, f"do_{name}")

    def _answer(self, line: str) -> None:
        requests = []
        for side in self._sides:
            request, left_out = side.request(line, self._system, self._sampling)
            requests.append(request)
            if left_out:
                self._face.note(f"the first {left_out} messages no longer fit the model's context and are left out")
        names = [side.speaker.name for side in self._sides]
        prompts = ["" if side.speaker.tuned else line for side in self._sides]
        answers, count, finish = ["" for _ in self._sides], 0, None
        start = time.monotonic()
        with ExitStack() as stack:
            interrupt = stack.enter_context(Interrupt())
            streams = [
                stack.enter_context(closing(side.speaker.engine.stream([request])))
                for side, request in zip(self._sides, requests, strict=True)
            ]
            show = stack.enter_context(self._face.answers(names, prompts))
            for index, piece in _in_turn(streams):
                answers[index] += piece.text
                count += piece.token is not None
                finish = piece.finish or finish
                show(index, piece.text)
                if interrupt.asked:
                    finish = "stopped"
                    break
        seconds = time.monotonic() - start
        self._face.aside(f"{count} tokens in {seconds:.1f} s, {count / seconds:,.1f} tokens/s, {finish}")
        for side, answer in zip(self._sides, answers, strict=True):
            side.remember(line, answer)


def _in_turn(streams: Sequence[Iterable[Piece]]) -> Iterable[tuple[int, Piece]]:
    """A piece of each stream after the other, until all are at their end."""
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
