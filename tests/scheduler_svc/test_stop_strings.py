import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler_svc.stop_strings import StopStrings
from scheduler_svc.text_stream import TextPiece, TextStream
from scheduler_svc.tokenizer import Tokenizer

# Few letters, so that stop strings overlap with the text, with each other and with themselves.
LETTERS = st.text(alphabet="abé😀", max_size=30)
STOPS = st.lists(st.text(alphabet="abé😀", min_size=1, max_size=6), min_size=1, max_size=5)


def until_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition, spelled out: read on until some stop string is complete, then drop the longest such."""
    for end in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))], True
    return text, False


def cut(text: str, ends: list[int]) -> list[str]:
    bounds = [0, *sorted(end % (len(text) + 1) for end in ends), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=8))
@example("aab", ["ab"], [1, 2])
@example("abab é", ["ababab", "ba"], [3])
@example("abc", ["abcd", "bc"], [])
def test_the_answer_ends_before_the_first_stop_string_however_the_text_is_cut(
    text: str, stops: list[str], ends: list[int]
):
    """What a client reads must not depend on how tokens happened to fall, and never contains a part of the stop."""
    stream = StopStrings(stops)
    expected, expected_hit = until_first_stop(text, stops)
    released, hit = "", False
    for piece in cut(text, ends):
        new, hit = stream.push(piece)
        released += new
        assert expected.startswith(released)

    assert hit == expected_hit
    assert released + stream.flush() == expected


@given(LETTERS, STOPS)
def test_holds_back_only_what_may_still_become_a_stop_string(text: str, stops: list[str]):
    """Text that cannot belong to a stop string any more reaches the client at once."""
    stream = StopStrings(stops)
    released, hit = stream.push(text)
    held = stream.flush()

    if not hit:
        assert released + held == text
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_one_stop_string_ends_inside_the_beginning_of_another():
    """The longer one may never come; generating on for it would leak the one that is there."""
    stream = StopStrings(["abcd", "bc"])

    assert stream.push("ab") == ("", False)
    assert stream.push("c") == ("a", True)
    assert stream.push("d") == ("", True)


def test_refuses_an_empty_stop_string():
    """An empty stop string would end every answer before it began."""
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings(["a", ""])


def push_singly(stream: TextStream, token_ids: list[int]) -> list[TextPiece]:
    return [stream.push([token_id]) for token_id in token_ids]


@given(LETTERS, st.lists(st.text(alphabet="abé😀", min_size=1, max_size=6), max_size=4), st.integers(0, 100))
def test_a_stream_rebuilt_from_its_tokens_goes_on_with_the_same_text(text: str, stops: list[str], position: int):
    """After a restart the scheduler replays the journal's tokens; the client's text must continue unbroken."""
    tokenizer = Tokenizer.bytes()
    token_ids = tokenizer.encode(text)
    cut_at = position % (len(token_ids) + 1)
    undisturbed = TextStream(tokenizer, stops)
    pieces = push_singly(undisturbed, token_ids)
    rebuilt = TextStream(tokenizer, stops)
    replayed = rebuilt.push(token_ids[:cut_at])

    assert replayed.text == "".join(piece.text for piece in pieces[:cut_at])
    rest = rebuilt.push(token_ids[cut_at:])
    assert rest.text == "".join(piece.text for piece in pieces[cut_at:])
    assert rest.stopped_at == (pieces[-1].stopped_at if pieces else None)
    assert rebuilt.finish() == undisturbed.finish()


@given(LETTERS, STOPS, st.integers(1, 7))
def test_names_the_token_that_completed_the_stop_string(text: str, stops: list[str], batch: int):
    """The core truncates the request to this count, so tokens after it are neither billed nor delivered."""
    tokenizer = Tokenizer.bytes()
    token_ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, stops)
    expected, hit = until_first_stop(text, stops)
    released, stopped_at = "", None
    for start in range(0, len(token_ids), batch):
        piece = stream.push(token_ids[start : start + batch])
        released, stopped_at = released + piece.text, piece.stopped_at
    released += stream.finish()

    assert released == expected
    assert (stopped_at is not None) == hit
    if stopped_at is not None:
        decoded = tokenizer.decode(token_ids[:stopped_at])
        assert any(decoded.endswith(stop) for stop in stops)
        assert not until_first_stop(tokenizer.decode(token_ids[: stopped_at - 1]).rstrip("\ufffd"), stops)[1]


def test_without_stop_strings_nothing_but_part_of_a_character_is_held_back():
    """Streaming must not lag for the many requests that name no stop string."""
    tokenizer = Tokenizer.bytes()
    stream = TextStream(tokenizer)

    assert [piece.text for piece in push_singly(stream, tokenizer.encode("aé😀"))] == ["a", "", "é", "", "", "", "😀"]
    assert stream.finish() == ""


def test_a_normal_end_releases_what_was_held_for_a_stop_string():
    """The beginning of a stop string that never came belongs to the answer, and so do bytes that were cut off."""
    tokenizer = Tokenizer.bytes()
    stream = TextStream(tokenizer, ["ab😀"])

    assert stream.push(tokenizer.encode("xab😀")[:-1]).text == "x"
    assert stream.finish() == "ab\ufffd"


def test_nothing_comes_after_a_stop():
    """Tokens that were already in flight when the stop was found must not reach the client."""
    tokenizer = Tokenizer.bytes()
    stream = TextStream(tokenizer, ["b"])

    assert stream.push(tokenizer.encode("abab")) == TextPiece("a", 2)
    assert stream.push(tokenizer.encode("ab")) == TextPiece("", 2)
    assert stream.finish() == ""
