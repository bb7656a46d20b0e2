import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from scheduler_svc.detokenizer import Detokenizer
from scheduler_svc.tokenizer import Tokenizer

SPLITS = st.lists(st.integers(1, 5), max_size=40)


def vocabulary(pieces: list[str], decoder: decoders.Decoder | None, added: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer with these pieces, a special token after them, and `decoder`."""
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=pieces[0]))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(list(added))
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    spelled = list(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    whole = ["Ġhello", "æĹ¥æľ¬", "ðŁĳ", "©âĢį", "Ċ", "<tool>"]
    # The decoder reads an added token letter by letter as bytes only where all of its letters can be bytes.
    return vocabulary(spelled + whole, decoders.ByteLevel(), added=("日本", "café", "a é"))


def sentence_piece() -> Tokenizer:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁▁", "▁the", "▁日本", "cat", "s", ".", "�", "<0x", "▁a▁b"]
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return vocabulary(words + bytes_, decoders.Sequence(steps), added=("<tool>", "日本"))


def metaspace() -> Tokenizer:
    return vocabulary(["▁", "▁▁", "▁the", "cat", "▁日本", "s", "�", ".", "▁a▁b"], decoders.Metaspace(), added=("<t>",))


def metaspace_in_sequence() -> Tokenizer:
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    return vocabulary(["▁the", "▁", "cat", "<0xE2>", "<0x82>", "<0xAC>", "<0x41>", "s"], decoders.Sequence(steps))


def word_piece() -> Tokenizer:
    return vocabulary(["the", "cat", "##s", "##é", ".", "do", "n't", "'m", "##", "日"], decoders.WordPiece())


def suffix_bpe() -> Tokenizer:
    return vocabulary(["the</w>", "ca", "t</w>", "</w>", ".", "日</w>"], decoders.BPEDecoder())


def no_decoder() -> Tokenizer:
    return vocabulary(["the", "cat", "s", "日"], None)


def byte_level_in_sequence() -> Tokenizer:
    return vocabulary(list(tokenizers.pre_tokenizers.ByteLevel.alphabet()), decoders.Sequence([decoders.ByteLevel()]))


KINDS = {
    make.__name__: make()
    for make in (
        byte_level,
        byte_level_in_sequence,
        sentence_piece,
        metaspace,
        metaspace_in_sequence,
        word_piece,
        suffix_bpe,
        no_decoder,
    )
}


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    pieces, start = [], 0
    for size in [*sizes, len(token_ids) or 1]:
        pieces.append(detokenizer.push(token_ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), sizes=SPLITS)
def test_the_pieces_together_are_the_whole_text(kind: str, data: st.DataObject, sizes: list[int]):
    """Streaming is another way to deliver the same answer, for every kind of tokenizer and any token sequence."""
    tokenizer = KINDS[kind]
    # A few ids beyond the vocabulary: models often have more logits than the tokenizer has tokens.
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size + 2), max_size=60))

    assert "".join(pieces_of(tokenizer, token_ids, sizes)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_in_sequence", "sentence_piece"])
@given(text=st.text(alphabet=st.sampled_from("a é€日👩🏽‍🚀\u200d🏳️🌈"), max_size=30), sizes=SPLITS)
@example(text="👩🏽‍🚀", sizes=[1] * 20)
def test_a_character_is_never_cut(kind: str, text: str, sizes: list[int]):
    """A client that prints pieces as they come must not show replacement characters for text that is whole."""
    tokenizer = KINDS[kind]
    spell = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    if kind == "sentence_piece":
        tokens = ["▁", *(f"<0x{byte:02X}>" for byte in text.encode())]  # the first space is not part of a text
    else:
        tokens = [letter for word, _ in spell(text) for letter in word]
    token_ids = [tokenizer._backend.token_to_id(token) for token in tokens]
    pieces = pieces_of(tokenizer, token_ids, sizes)

    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert all(text.startswith("".join(pieces[:count])) for count in range(len(pieces)))


def test_text_comes_with_its_token():
    """A token that ends a character is shown at once: holding one more back would delay every answer by a step."""
    tokenizer = KINDS["byte_level"]
    detokenizer = Detokenizer(tokenizer)
    ids = [tokenizer._backend.token_to_id(token) for token in ("Ġhello", "æĹ¥æľ¬", "ðŁĳ", "©âĢį", "Ċ")]

    assert [detokenizer.push([token_id]) for token_id in ids] == [" hello", "日本", "", "👩\u200d", "\n"]


@pytest.mark.parametrize("kind", ["sentence_piece", "metaspace", "word_piece", "suffix_bpe", "no_decoder"])
def test_a_long_answer_is_released_token_by_token(kind: str):
    """The window that is decoded again for each token must neither lose text at its cuts nor hold words back."""
    tokenizer = KINDS[kind]
    words = [number for number in range(12) if (tokenizer.token(number) or "<").isalpha()]
    token_ids = words * 40
    detokenizer = Detokenizer(tokenizer)
    for count, token_id in enumerate(token_ids, start=1):
        assert detokenizer.push([token_id]) != "", f"token {count} brought no text"

    assert detokenizer.flush() == ""


def test_bytes_that_are_no_character_come_out_when_that_is_certain():
    """A model that emits broken UTF-8 must not make its stream fall silent."""
    tokenizer = Tokenizer.bytes()
    detokenizer = Detokenizer(tokenizer)

    assert detokenizer.push([0xF0]) == ""
    assert detokenizer.push([0x9F]) == ""
    assert detokenizer.push([ord("a")]) == "\ufffda"
    assert detokenizer.push([0xFF]) == "\ufffd"
    assert detokenizer.push([0xE2]) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_not_text(kind: str):
    """The end-of-sequence token is delivered as an id; its spelling is not part of the answer."""
    tokenizer = KINDS[kind]
    end = tokenizer._backend.token_to_id("<|end|>")

    assert "".join(pieces_of(tokenizer, [end, 1, end], [1, 1])) == tokenizer.decode([1])
