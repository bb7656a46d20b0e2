"""The text of one request: its tokens in, what its client may read out."""

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler_svc.detokenizer import Detokenizer
from scheduler_svc.stop_strings import StopStrings
from scheduler_svc.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextPiece:
    """New text, and where a stop string ended it."""

    text: str
    stopped_at: int | None = None
    """Tokens of the output up to and including the one that completed the stop string; None while there is none."""


class TextStream:
    """Detokenizes a request's output and watches for its stop strings.

    Holds nothing that its tokens do not give: pushing the same tokens into a new one, cut in any way, gives the same
    text and the same end.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops) if stops else None
        self._token_count = 0  # pushed, up to the token that stopped the text
        self._stopped_at: int | None = None

    @property
    def has_stops(self) -> bool:
        """Whether it watches for stop strings, and so wants every token at once."""
        return self._stops is not None

    def push(self, token_ids: Sequence[int]) -> TextPiece:
        """Take new tokens of the output; give the text that became certain with them.

        After a stop string nothing comes any more, whatever is pushed.
        """
        if self._stops is None:
            self._token_count += len(token_ids)
            return TextPiece(self._detokenizer.push(token_ids))
        released = []
        for token_id in token_ids:
            if self._stopped_at is not None:
                break
            self._token_count += 1
            text, hit = self._stops.push(self._detokenizer.push((token_id,)))
            released.append(text)
            if hit:
                self._stopped_at = self._token_count
        return TextPiece("".join(released), self._stopped_at)

    def finish(self) -> str:
        """Give what is still held back, when the request ended without a stop string; '' after one."""
        text = self._detokenizer.flush()
        if self._stops is None:
            return text
        released, _ = self._stops.push(text)  # the last bytes may still complete a stop string, which is left out
        return released + self._stops.flush()
