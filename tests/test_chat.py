"""trainer.chat through a real pseudo-terminal and through a pipe, and trainer.generate."""

import dataclasses
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pexpect
import pytest
import torch
from pexpect import fdpexpect

from core.data import chat_template, vocabulary
from core.settings.inference import InferenceOptions, Sampling
from tests import checkpoints, patched, warm
from tests.conftest import REPOSITORY
from tests.patience import PATIENCE_SECONDS
from trainer import export
from trainer.inference.chat_model import ChatModel, open_chat_model
from trainer.inference.engine import Engine, GenerationRequest
from trainer.inference.terminal import printable

READY, TAKEN = "\x1b[?2004h", "\x1b[?2004l"  # bracketed paste is on while a line is written
CONFIG = dataclasses.replace(checkpoints.SMALL, context=1024)
SHORT = {"trainer.inference.speed.PROMPT_TOKENS": 24, "trainer.inference.speed.NEW_TOKENS": 5}  # of /bench
GREEDY = Sampling(max_tokens=12, temperature=0)
_STEERING = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r|\x1b\][^\x07]*\x07")


@pytest.fixture(scope="module")
def encoding(vocab_bpe):
    return vocabulary.read(str(vocab_bpe)).encoding()


@pytest.fixture(scope="module")
def models():
    return {"base": checkpoints.random_model(CONFIG), "tuned": checkpoints.random_model(CONFIG, seed=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models) -> Path:
    """Holds the runs `base` and `tuned`."""
    folder = tmp_path_factory.mktemp("runs")
    checkpoints.store(str(folder / "base"), models["base"])
    checkpoints.store(str(folder / "tuned"), models["tuned"], template=chat_template.NAME)
    return folder


@pytest.fixture(scope="module")
def environment(vocab_bpe) -> dict[str, str]:
    # No cursor position requests: nobody answers them on this terminal. One thread: the machine has other work.
    more = {"VOCAB_URL": str(vocab_bpe), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **more}


class Terminal:
    """A chat on a pseudo-terminal of 40 lines and 240 columns."""

    def __init__(self, folder: Path, environment: dict[str, str], *arguments: str):
        ours, its = pty.openpty()
        # Wide: names of models are paths here, and stand whole above their columns.
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 240, 0, 0))
        self.process = warm.Popen(
            [sys.executable, *patched.module_of("trainer.chat", SHORT), *arguments],
            cwd=REPOSITORY,
            env=environment | {"COLUMNS": "240", "LINES": "40"},
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
        os.close(its)
        self.child = fdpexpect.fdspawn(ours, encoding="utf-8", timeout=PATIENCE_SECONDS)
        self.child.delaybeforesend = None
        self.wait()

    def end(self) -> int:
        """The exit code, once it has closed the terminal."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.process.wait(PATIENCE_SECONDS)

    def wait(self) -> str:
        """Until a line can be written; what was shown before."""
        self.child.expect_exact(READY)
        return _STEERING.sub("", self.child.before)

    def say(self, line: str) -> str:
        """What is shown after a line."""
        self.child.send(f"{line}\r")
        self.child.expect_exact(TAKEN)
        return self.wait()


def answer(model, encoding, tokens: list[int], sampling: Sampling = GREEDY) -> str:
    return Engine(model, encoding, torch.device("cpu")).complete([GenerationRequest(tokens, sampling)])[0].text


def conversation(encoding, *texts: str) -> list[int]:
    """Turns of user and assistant, up to the next answer."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return chat_template.render(messages, encoding, add_generation_prompt=True).tokens


def words(text: str) -> str:
    return " ".join(printable(text).split())


def test_a_terminal_session_does_every_command(folder, environment, models, encoding, tmp_path):
    base, tuned = str(folder / "base"), str(folder / "tuned")
    terminal = Terminal(folder, environment, base, "--max_tokens=12")
    continued = answer(models["base"], encoding, [50256, *encoding.encode_ordinary("Once upon a")])
    assert "temperature is 0.0" in terminal.say("/set temperature 0")
    shown = terminal.say("Once upon a")
    assert words("Once upon a" + continued) in words(shown)
    assert re.search(r"12 tokens in .* tokens/s, length", shown)

    assert "choose among the likeliest tokens that have this probability together" in words(terminal.say("/set"))
    assert "error: /set: top_p: is 7.0, must be above 0 and at most 1" in terminal.say("/set top_p 7")
    assert "error: unknown command /hlep; did you mean /help?" in terminal.say("/hlep")
    listed = terminal.say("/help")
    assert all(name in listed for name in ("/set", "/compare", "/bench", "/save", "/new", "/quit", "Ctrl-C"))

    shown = terminal.say("/bench")
    assert re.search(r"1 x 24 \+ 5 +[\d,]+ +[\d,.]+", shown)
    assert re.search(r"memory: weights 3\.\d MB, cache 0\.1 kB per token of a text, peak [\d,]+ MB", shown)

    shown = terminal.say("/bench Once upon a")
    assert [*re.findall(r"^ *(\d|mean) +12 +\d", printable(shown), re.M)] == ["1", "2", "3", "mean"]
    shown = words(terminal.say("/compare"))
    assert re.search(r"4 tokens of prompt .* on 12 [\d.]+ [\d,.]+ off 12 [\d.]+ [\d,.]+", shown)
    assert re.search(r"with the cache [\d.]+ times as fast; the same text", shown)

    assert f"comparing with {tuned} step 1" in words(terminal.say(f"/compare {tuned}"))
    shown = words(terminal.say("Hello there"))
    assert f"{base} step 1" in shown
    for first in (
        continued_words(answer(models["base"], encoding, [50256, *encoding.encode_ordinary("Hello there")]))[0],
        continued_words(answer(models["tuned"], encoding, conversation(encoding, "Hello there")))[0],
    ):
        assert first in shown
    assert "no comparison" in terminal.say("/compare off")

    kept = tmp_path / "kept.jsonl"
    assert f"1 lines in {kept}" in terminal.say(f"/save {kept}")
    row = json.loads(kept.read_text())
    assert (row["prompt"], row["sampling"]["temperature"]) == ("Hello there", 0)
    assert "exists already; nothing was overwritten" in words(terminal.say(f"/save {kept}"))

    terminal.child.send("/quit\r")
    assert terminal.end() == 0


def continued_words(text: str) -> list[str]:
    return [word for word in printable(text).split() if word.isalpha()]


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_program(folder, environment):
    terminal = Terminal(folder, environment, str(folder / "base"), "--max_tokens=1000", "--seed=1")
    terminal.child.send("Tell me everything\r")
    terminal.child.expect_exact(TAKEN)
    terminal.child.expect_exact("Tell me everything")  # what is continued
    terminal.child.expect("[a-z]{3}")
    terminal.child.send("\x03")
    shown = terminal.wait()
    count = int(re.search(r"(\d+) tokens in .*, stopped", shown)[1])
    assert 0 < count < 1000
    terminal.child.send("\x03")  # at the prompt
    assert "Ctrl-D or /quit ends the chat" in terminal.wait()
    terminal.child.send("\x04")
    assert terminal.end() == 0


def piped(environment, module: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"trainer.{module}", *arguments]
    return warm.run(command, cwd=REPOSITORY, env=environment, input=text, timeout=PATIENCE_SECONDS)


def test_a_conversation_in_a_pipe(folder, environment, models, encoding, tmp_path):
    """A tuned model sees what was said before, in turns."""
    kept = tmp_path / "kept.jsonl"
    lines = f"Hello\nAnd then?\n/save {kept}\n/new\nHello\n"
    result = piped(environment, "chat", str(folder / "tuned"), "--max_tokens=12", "--temperature=0", text=lines)
    assert result.returncode == 0, result.stderr
    first = answer(models["tuned"], encoding, conversation(encoding, "Hello"))
    second = answer(models["tuned"], encoding, conversation(encoding, "Hello", first, "And then?"))
    assert result.stdout == "".join(printable(text) + "\n" for text in (first, second, first))
    assert json.loads(kept.read_text())["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": second},
    ]


def test_an_error_in_a_pipe_is_told_by_the_exit_code(folder, environment):
    result = piped(environment, "chat", str(folder / "tuned"), text="/set nonsense 1\n" + "word " * 1100 + "\n")
    assert result.returncode == 1
    assert "error: /set: unknown setting nonsense" in result.stderr
    assert re.search(r"error: the newest message makes \d+ tokens with its headings, but only 896 fit", result.stderr)
    assert "Traceback" not in result.stderr


def test_old_turns_leave_a_full_context(folder, vocab_bpe, monkeypatch):
    monkeypatch.setenv("VOCAB_URL", str(vocab_bpe))
    model: ChatModel = open_chat_model(str(folder / "tuned"), InferenceOptions(device="cpu"))
    assert model.tuned
    turns = [{"role": role, "content": "word " * 200} for _ in range(4) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "And?"}]
    tokens, left_out = model.recent(messages, Sampling(max_tokens=100))
    assert left_out == 4
    assert tokens == model.conversation([messages[0], *messages[5:]])
    assert model.recent(messages[-1:], Sampling())[1] == 0


def test_an_exported_folder_is_spoken_to_as_what_it_was(folder, vocab_bpe, monkeypatch, tmp_path):
    monkeypatch.setenv("VOCAB_URL", str(vocab_bpe))
    for name, tuned in {"base": False, "tuned": True}.items():
        export.main([str(folder / name), str(tmp_path / name)])
        assert open_chat_model(str(tmp_path / name), InferenceOptions(device="cpu")).tuned == tuned


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\tc\n\x07\x9b\x7f🙂") == "a\ufffd[2Jb\tc\n\ufffd\ufffd\ufffd🙂"


def test_generate_prints_samples(folder, environment, models, encoding, tmp_path):
    base = str(folder / "base")
    flags = ("--max_tokens=12", "--temperature=0")
    expected = answer(models["base"], encoding, [50256, *encoding.encode_ordinary("Once upon a")])
    alone = piped(environment, "generate", base, "--prompt=Once upon a", *flags)
    assert (alone.returncode, alone.stdout) == (0, f"Once upon a{expected}\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a\n\nHello\n")
    several = piped(environment, "generate", base, f"--prompts={prompts}", "--samples=2", "--json", "--seed=4", *flags)
    rows = [json.loads(line) for line in several.stdout.splitlines()]
    assert [(row["prompt"], row["sample"], row["seed"]) for row in rows] == [
        ("Once upon a", 0, 4),
        ("Once upon a", 1, 5),
        ("Hello", 0, 4),
        ("Hello", 1, 5),
    ]
    assert rows[0]["text"] == rows[1]["text"] == expected
    assert re.search(r"4 texts, 48 tokens in", several.stderr)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["generate"], "error: give exactly one checkpoint or run, not 0: python -m trainer.generate "),
        (["generate", "x", "--prompt=a", "--prompts=b"], "prompts: is set beside --prompt; give one of them"),
        pytest.param(
            ["chat", "x", "--max_batch_size=0"],
            "error: flag --max_batch_size: max_batch_size: is 0, must be at least 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["generate", "x", "--tokens=9"],
            "error: flag --tokens=9: tokens is an old name; write max_tokens",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["serve", "x", "--port=70000"],
            "error: flag --port: port: is 70000, must be between 0 and 65535",
            marks=pytest.mark.slow,
        ),
        (["serve", "x", "--host=0.0.0.0"], "and SERVE_API_KEY is empty; set it to a secret"),
        pytest.param(
            ["chat", "x", "--serve"],
            "error: --serve: is a separate program; run python -m trainer.serve",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_opened(environment, arguments: list[str], error: str):
    result = piped({**environment, "SERVE_API_KEY": ""}, *arguments)
    assert result.returncode == 1
    assert error in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["generate", "chat", "serve"])
def test_help_lists_every_setting(environment, module: str):
    result = piped(environment, module, "--help")
    assert result.returncode == 0
    for field in dataclasses.fields(Sampling):
        assert f"--{field.name}=" in result.stdout
