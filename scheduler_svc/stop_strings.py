"""Finds the text at which an answer is to end, as the text comes in."""

from collections.abc import Sequence


class StopStrings:
    """Holds text back while it may be the beginning of a stop string, and ends it before the first that is complete.

    First means: complete at the earliest character, and of two that are complete at the same character the longer one.
    So the outcome does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must have at least one character, got ''")
        # Every beginning of a stop string, with the length of the longest stop string that it ends with (0: none).
        # `abc` of the stop string `abcd` ends with the stop string `bc`.
        self._beginnings = {
            stop[:length]: max((len(other) for other in stops if stop[:length].endswith(other)), default=0)
            for stop in stops
            for length in range(len(stop) + 1)
        }
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""  # longest end of the text so far that is a beginning of a stop string
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take new text; give what is certain not to belong to a stop string, and whether one is complete.

        After a hit nothing comes any more.
        """
        if self._hit:
            return "", True
        if not self._held and self._first_characters.isdisjoint(text):
            return text, False

        known, held = self._held, self._held
        for position, character in enumerate(text):
            held += character
            while held not in self._beginnings:
                held = held[1:]
            if stop_length := self._beginnings[held]:
                self._held, self._hit = "", True
                return (known + text[: position + 1])[:-stop_length], True
        self._held = held
        whole = known + text
        return whole[: len(whole) - len(held)], False

    def flush(self) -> str:
        """Give what is still held back: the answer ended, and no stop string came."""
        held, self._held = self._held, ""
        return held
