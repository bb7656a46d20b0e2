"""Several continuations of one prompt over one stream: which piece belongs where, and when all of it is there."""

import grpc
import pytest

from paceline import Choice, Chunk, FinishReason, ServerError, Usage
from paceline.v1 import inference_pb2 as pb
from tests.client.scripted_server import ACCEPTED, Fail, Wait, end_of_choice, last, tokens

USAGE = Usage(5, 2, 10, 20, 30, 0, 4)
TWO_CHOICES = (
    ACCEPTED,
    tokens("Hel", 7),
    tokens("Good", 5, choice=1),
    end_of_choice("lo", 8),
    tokens(" d", 6, choice=1),
    last("ay", 9, choice=1, reason=pb.FINISH_REASON_STOP),
)


def test_says_of_each_chunk_which_choice_it_belongs_to(client, server):
    """The choices of a request run side by side, so their pieces come mixed."""
    server.scripts.append(TWO_CHOICES)

    assert list(client.generate("Say hello", n=2)) == [
        Chunk("Hel", (7,)),
        Chunk("Good", (5,), choice=1),
        Chunk("lo", (8,), FinishReason.LENGTH),
        Chunk(" d", (6,), choice=1),
        Chunk("ay", (9,), FinishReason.STOP, USAGE, choice=1),
    ]


def test_has_each_choice_whole_after_the_last_chunk(client, server):
    """Nobody should have to put the pieces together; the fields of choice 0 are those of an answer without `n`."""
    server.scripts.append(TWO_CHOICES)
    output = client.generate("Say hello", n=2, stream=False)

    assert output.choices == (
        Choice(0, "Hello", (7, 8), FinishReason.LENGTH),
        Choice(1, "Good day", (5, 6, 9), FinishReason.STOP),
    )
    assert (output.text, output.token_ids, output.finish_reason) == ("Hello", (7, 8), "length")
    assert output.usage == USAGE


def test_shows_the_texts_so_far_by_choice(client, server):
    """A user interface draws one box for each; a choice that has not begun has an empty one."""
    server.scripts.append((*TWO_CHOICES[:3], Wait()))
    with client.generate("Say hello", n=3) as stream:
        before = stream.texts
        next(stream)
        next(stream)

        assert before == ("", "", "")
        assert stream.texts == ("Hel", "Good", "")
        assert stream.text == "Hel"


def test_one_ended_choice_does_not_end_the_answer(client, server):
    """Its finish reason is not that of the others; half an answer must not pass for a whole one."""
    server.scripts.append((*TWO_CHOICES[:4], Wait()))
    with client.generate("Say hello", n=2) as stream:
        chunks = [next(stream) for _ in range(3)]

        assert chunks[-1].finish_reason is FinishReason.LENGTH
        assert chunks[-1].usage is None
        with pytest.raises(RuntimeError, match="before its last chunk"):
            _ = stream.output


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (TWO_CHOICES[:-1], "without a finish reason for choice 1"),
        ((ACCEPTED, last("Hello", 7)), "without a finish reason for choice 1"),  # as from a server that ignores `n`
        ((ACCEPTED, end_of_choice("a", 7), end_of_choice("b", 8, choice=1)), "without the usage"),
        ((ACCEPTED, tokens("a", 7, choice=2)), "a piece of choice 2, but the request has n=2"),
    ],
)
def test_refuses_an_answer_that_is_not_what_was_asked_for(client, server, script, message):
    """Whoever asked for two continuations must not go on with one as if that was all."""
    server.scripts.append(script)

    with pytest.raises(ServerError, match=message):
        client.generate("Say hello", n=2, stream=False)


def test_an_error_after_one_choice_ended_leaves_what_came(client, server):
    """The tokens of all choices were delivered; the message counts them all."""
    server.scripts.append((*TWO_CHOICES[:4], Fail(grpc.StatusCode.INTERNAL)))
    stream = client.generate("Say hello", n=2)

    with pytest.raises(ServerError, match=r"after 3 tokens"):
        list(stream)
    assert stream.texts == ("Hello", "Good")
    assert len(server.requests) == 1


def test_an_error_after_everything_came_is_none(client, server):
    """Also with several choices the message with the usage is the end."""
    server.scripts.append((*TWO_CHOICES, Fail(grpc.StatusCode.INTERNAL)))

    assert len(client.generate("Say hello", n=2, stream=False).choices) == 2
