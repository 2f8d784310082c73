"""Makes standard output safe: neither its encoding, nor a full disk, nor a closed pipe crashes a program.

    output.prepare(is_product=True)

Characters that the encoding lacks are replaced. If a write fails, a program whose output is its product gets the
exception OutputEnds. Any other program continues without output, because its work matters more.
"""

import codecs
import contextlib
import io
import os
import re
import sys

SIMPLER = {"–": "-", "—": "-", "→": "->", "…": "...", "×": "x", "·": "*", "≤": "<=", "≥": ">=", "≈": "~", "−": "-"}
SIMPLER |= {"“": '"', "”": '"', "‘": "'", "’": "'", "✓": "ok", "✗": "x", "\u00a0": " ", "\u202f": " ", "\u2009": " "}
# If a text starts with one of these characters, a spreadsheet runs the text as a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
# Control characters of a terminal except line ends and tabs, and characters that reverse or hide the text after them.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


class OutputEnds(Exception):
    """A write to standard output failed. `error` is the operating system's error."""

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self.error = error


class _Output(io.FileIO):
    """The raw file of standard output. After the first write that fails, it discards all further output."""

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
    """Replace sys.stdout by a safe stream, unless other code has replaced it already.

    If standard output is closed, the new stream writes to the null device.
    """
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
    """`text` with each terminal control character as an escape such as \\x1b. Strangers may have written the text."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def failure() -> OSError | None:
    """Flush standard output. Returns the first error that a write to standard output raised, or None."""
    with contextlib.suppress(OutputEnds):
        sys.stdout.flush()
    return _output.failure if _output else None


def _simpler(error: UnicodeError) -> tuple[str | bytes, int]:
    """Codec error handler: replaces a character by a similar ASCII one, by its original byte, or by an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if character in SIMPLER:
        return SIMPLER[character], error.start + 1
    # Python's error handler surrogateescape uses these code points for bytes of a file name that are not UTF-8.
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    escape = character.encode("ascii", "backslashreplace").decode()
    return escape, error.start + 1
