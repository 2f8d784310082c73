"""Text from tokens as they come: no half character and no half stop text is ever shown."""

import codecs
from collections.abc import Sequence


class TextStream:
    """`feed` takes a token's bytes and gives what may be shown by now; a stop text ends it."""

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes, final: bool = False) -> tuple[str, bool]:
        """Text, and whether a stop text was met (it is left out, with all behind it). `final` holds nothing back."""
        self._held += self._decoder.decode(data, final)
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = 0 if final else self._beginning_of_a_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False

    def _beginning_of_a_stop(self) -> int:
        """Length of the longest end of what is held that a stop text begins with."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
