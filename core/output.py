"""Prepares standard output, so that what is behind it (a terminal, a file, a pipe) cannot end a program by surprise.

    output.prepare(is_product=True)

Characters that the encoding lacks are replaced. If output fails (the disk is full, the reader has gone), a program
whose output is its product ends with OutputEnds; any other one goes on without output, because its work matters more.
"""

import codecs
import contextlib
import io
import os
import re
import sys

SIMPLER = {"–": "-", "—": "-", "→": "->", "…": "...", "×": "x", "·": "*", "≤": "<=", "≥": ">=", "≈": "~", "−": "-"}
SIMPLER |= {"“": '"', "”": '"', "‘": "'", "’": "'", "✓": "ok", "✗": "x", "\u00a0": " ", "\u202f": " ", "\u2009": " "}
# What a terminal obeys, and what turns or hides the text after it. Line ends and tabs are not among them.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


class OutputEnds(Exception):
    """Standard output does not take more. `error` is the system's reason."""

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self.error = error


class _Output(io.FileIO):
    """Standard output's file. After its first failure it discards all that is written."""

    def __init__(self, descriptor: int, is_product: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._is_product = is_product
        self.failure: OSError | None = None

    def write(self, data) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
                if self._is_product:
                    raise OutputEnds(error) from None
        return len(data)


_output: _Output | None = None


def prepare(is_product: bool) -> None:
    """Replace sys.stdout, if it is still the interpreter's own. A closed one leads nowhere."""
    global _output
    codecs.register_error("simpler", _simpler)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is not sys.__stdout__ or not isinstance(sys.stdout, io.TextIOWrapper):
        return
    old = sys.stdout
    old.flush()
    _output = _Output(old.fileno(), is_product)
    sys.stdout = io.TextIOWrapper(
        _output if old.write_through else io.BufferedWriter(_output),  # as the interpreter does
        encoding=old.encoding,
        errors="simpler" if old.errors in ("strict", "surrogateescape") else old.errors,
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )


def visible(text: str) -> str:
    """`text` with each character that a terminal obeys as an escape such as \\x1b. Others may have written the text."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def failure() -> OSError | None:
    """Why standard output failed; None if it did not. Writes what is still in memory."""
    with contextlib.suppress(OutputEnds):
        sys.stdout.flush()
    return _output.failure if _output else None


def _simpler(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of an encoding: a similar ASCII character, the original byte, or an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if character in SIMPLER:
        return SIMPLER[character], error.start + 1
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte of a file's name that is not UTF-8
        return bytes([ord(character) - 0xDC00]), error.start + 1
    escape = character.encode("ascii", "backslashreplace").decode()
    return escape, error.start + 1
