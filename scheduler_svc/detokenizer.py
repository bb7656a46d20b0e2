"""From token ids to text while the tokens are still coming."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from scheduler_svc.tokenizer import Tokenizer


class Detokenizer:
    """Turns a request's tokens into text, piece by piece.

    All pieces together are what decoding all tokens at once gives, without special tokens. A piece never ends inside a
    UTF-8 character: the first tokens of one are held back until the last has come. Bytes that can no longer become a
    character come out as U+FFFD. Rebuilt by pushing the same tokens again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.byte_pieces
        self._decoder: _Decoder = _ByteDecoder(pieces) if pieces is not None else _WindowDecoder(tokenizer)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens; give the text that is certain now."""
        return self._decoder.push(token_ids)

    def flush(self) -> str:
        """Give what is still held back, at the end."""
        return self._decoder.flush()


class _Decoder(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class _ByteDecoder:
    """Byte-level BPE: a token is a fixed run of bytes, so all that is left is UTF-8."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        return self._utf8.decode(b"".join([pieces[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Every other tokenizer: decode a window of the last tokens and give what is new at its end.

    The text of a token may depend on its neighbours: the first of a text loses its leading space, a continuation its
    `##`. Inside a window that begins a few tokens earlier it reads as in the whole. The window is cut back after
    `_LONGEST` tokens, so the work for a token does not grow with the text.
    """

    _CONTEXT = 4  # tokens with text that a window begins with; more than any decoder's strip at the start removes
    _LONGEST = 16

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._has_byte_fallback = tokenizer.has_byte_fallback
        self._window: list[int] = []  # tokens with text only
        self._released_length = 0  # characters of the window's text that were given out

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        piece = self._tokenizer.decode(self._window)[self._released_length :]
        self._window, self._released_length = [], 0
        return piece

    def _push_one(self, token_id: int) -> str:
        if self._tokenizer.without_text(token_id):
            return ""
        self._window.append(token_id)
        # Tokens for single bytes stand for characters only if all of an unbroken run of them is valid; else each
        # becomes U+FFFD. So the run is held back until it is over.
        if self._has_byte_fallback and _is_byte(self._tokenizer.token(token_id)):
            return ""
        text = self._tokenizer.decode(self._window)
        end = len(text) - text.endswith("\ufffd")  # may be the beginning of a character
        piece = text[self._released_length : end]
        self._released_length = max(end, self._released_length)
        if len(self._window) > self._LONGEST:
            self._cut_back(len(text) - self._released_length)
        return piece

    def _cut_back(self, held_length: int) -> None:
        self._window = self._window[-self._CONTEXT :]
        self._released_length = len(self._tokenizer.decode(self._window)) - held_length


def _is_byte(token: str | None) -> bool:
    return token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
