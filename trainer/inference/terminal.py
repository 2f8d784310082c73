"""Displays a chat: with colours, columns and line editing on a terminal, as plain text in a pipe.

Answers go to standard output. In a pipe, notes and errors go to standard error.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.errors import ConfigError

REFRESHES_PER_SECOND = 10
# Control characters (C0, DEL and C1) are replaced, so that a model's output cannot control the terminal. Line breaks
# and tabs are kept.
_CONTROL = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Terminal:
    """Standard input and output of a chat."""

    def __init__(self):
        self._console = Console(highlight=False, soft_wrap=True)
        self.is_terminal = self._console.is_terminal
        self._aside = self._console if self.is_terminal else Console(stderr=True, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self._aside.print(Text(printable(text), style="dim"))

    def aside(self, text: str) -> None:
        """Shows a note on a terminal only."""
        if self.is_terminal:
            self.note(text)

    def error(self, text: str) -> None:
        self._aside.print(Text(f"error: {printable(text)}", style="red"))

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(*headings, box=None, pad_edge=False, header_style="dim")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._console.print(table, soft_wrap=False)

    def waiting(self, text: str) -> contextlib.AbstractContextManager:
        return self._aside.status(text) if self.is_terminal else contextlib.nullcontext()

    @contextlib.contextmanager
    def answers(self, names: Sequence[str], prompts: Sequence[str]) -> Iterator[Callable[[int, str], None]]:
        """Yields a function `show(index, text)` that appends text to an answer. Two answers appear side by side.

        Each answer is shown after its prompt, which is empty for a tuned model.
        """
        if len(names) == 1:
            self._console.print(Text(printable(prompts[0]), style="dim"), end="")
            yield lambda _, text: self._console.print(Text(printable(text)), end="")
            self._console.print()
            return
        texts = [Text(printable(prompt), style="dim") for prompt in prompts]

        def picture() -> Table:
            table = Table(*map(printable, names), expand=True)
            for column in table.columns:
                column.ratio = 1
                column.overflow = "fold"
            table.add_row(*texts)
            return table

        with Live(get_renderable=picture, console=self._console, refresh_per_second=REFRESHES_PER_SECOND):
            yield lambda index, text: texts[index].append(printable(text), style="not dim")
        if not self.is_terminal:  # if the output is not a terminal, Live does not end with a line break
            self._console.print()

    def lines(self, commands: Sequence[str]) -> Iterator[str]:
        """Yields the user's lines until the end of input. Raises ConfigError if prompt-toolkit is missing."""
        if not (self.is_terminal and sys.stdin.isatty()):
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
            from prompt_toolkit.completion import WordCompleter
        except ImportError as error:
            raise ConfigError("chat on a terminal needs prompt-toolkit: pip install prompt-toolkit") from error
        words = WordCompleter([f"/{name}" for name in commands], sentence=True)
        session = PromptSession(completer=words, complete_while_typing=False, auto_suggest=AutoSuggestFromHistory())
        while True:
            try:
                yield session.prompt("› ")
            except KeyboardInterrupt:
                self.note("Ctrl-D or /quit ends the chat")
            except EOFError:
                return


class Interrupt:
    """Within this context, Ctrl-C sets `asked` and does not interrupt a step of the model."""

    def __enter__(self) -> "Interrupt":
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_) -> None:
        self.asked = True


def printable(text: str) -> str:
    """Replaces each control character by U+FFFD."""
    return text.translate(_CONTROL)
