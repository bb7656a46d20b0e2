"""Bad input is refused at the door, naming the field, the value, the limit and the way out."""

import math
from array import array

import grpc
import pytest

from common.errors import RefusedError
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.door import Door, request_id_of, sampling_defaults
from scheduler_svc.fleet import ModelLimits
from scheduler_svc.tokenizer import Tokenizer
from tests.system import request

LIMITS = ModelLimits(context_length=32, vocabulary_size=257, end_token_ids=(256,))


@pytest.fixture
def door():
    return Door(SchedulerConfig(model="fake", max_prompt_bytes=1000), "fake", Tokenizer.bytes(), {})


def token_ids(*ids):
    return {"token_ids": {"ids": array("I", ids).tobytes()}}


def chat(*messages):
    return {"chat": {"messages": [{"role": role, "content": content} for role, content in messages]}}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (request(""), "text gives an empty prompt"),
        (request(**token_ids()), "token_ids gives an empty prompt"),
        (request(**chat()), "chat has 0 messages"),
        (request(**chat(("", "hi"))), "chat message 0 has no role"),
        (request(token_ids={"ids": b"abc"}), "token_ids has 3 bytes, which is not a whole number"),
        (request(**token_ids(1, 257)), "token_ids contains 257, but the vocabulary ends at 256"),
        (request("x" * 32), "the prompt has 32 tokens but the context length of the model is 32"),
        (request("x" * 1001), "text has 1001 bytes, the limit is 1000"),
        (request(**token_ids(*[1] * 40)), "token_ids has 40 tokens but the context length of the model is 32"),
        (request("x" * 20, 13), "max_output_tokens is 13, but the prompt has 20 tokens .* ask for at most 12"),
        (request("x", 0), "max_output_tokens is 0, must be at least 1"),
        (request(temperature=math.nan), "temperature is nan, must be 0 to 100"),
        (request(temperature=-1), "temperature is -1, must be 0 to 100"),
        (request(temperature=math.inf), "temperature is inf"),
        (request(temperature=1, top_p=0), "top_p is 0, must be above 0 and at most 1"),
        (request(temperature=1, top_p=math.nan), "top_p is nan"),
        (request(temperature=1, min_p=1.5), "min_p is 1.5, must be 0 to 1"),
        (request(temperature=0, top_k=5), "top_k is 5 but temperature is 0"),
        (request(temperature=0, top_p=0.5), "top_p is 0.5 but temperature is 0"),
        (request(stop=["a"] * 17), "stop has 17 texts, at most 16"),
        (request(stop=["a", ""]), r"stop\[1\] has 0 bytes, must be 1 to 256"),
        (request(stop=["a" * 257]), r"stop\[0\] has 257 bytes"),
        (request(stop_token_ids=[300]), "stop_token_ids contains 300, but the vocabulary ends at 256"),
        (request(stop_token_ids=[1] * 65), "stop_token_ids has 65 entries, at most 64"),
        (request(choice_count=65), r"choice_count \(n\) is 65, at most 64 are possible"),
        (request(priority=1001), "priority is 1001, must be -1000 to 1000; the larger goes first"),
        (request(priority=-1001), "priority is -1001, must be -1000 to 1000"),
        (request(tenant="two words"), "tenant 'two words' must be 1 to 128 printable ASCII"),
        (request(tenant="x" * 129), "tenant 'x*...' must be"),
        (request(cache_salt="ü" * 129), "cache_salt has 258 bytes, at most 256 are possible"),
        (request(**chat(*[("user", "")] * 5000)), "chat has 5000 messages, must have 1 to 4096|chat has .* bytes"),
        (request(**chat(("r" * 2000, "hi"))), "chat has 2.* bytes, the limit is 1000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_refuses_bad_input_with_the_value_the_limit_and_the_way_out(door, message, reason):
    """Whoever made the mistake can mend it from the message alone; nobody else notices it."""
    with pytest.raises(RefusedError, match=reason) as caught:
        await door.request(message, "r", LIMITS, math.inf, None)

    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_refuses_a_prompt_that_is_missing(door):
    """Nothing to continue is a mistake of the caller, not an empty answer."""
    message = request()
    message.ClearField("text")

    with pytest.raises(RefusedError, match="prompt is missing; set one of text, token_ids and chat"):
        await door.request(message, "r", LIMITS, math.inf, None)


async def test_refuses_another_model_by_name(door):
    """A client that talks to the wrong server must learn it before it trusts the answers."""
    with pytest.raises(RefusedError, match="model 'other' is not served here; this server has 'fake'") as caught:
        await door.request(request(model="other"), "r", LIMITS, math.inf, None)

    assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_asks_to_retry_before_an_executor_has_joined(door):
    """The limits of the model are not known yet; clients retry `UNAVAILABLE` by themselves."""
    with pytest.raises(RefusedError) as caught:
        await door.request(request(), "r", None, math.inf, None)

    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_fills_in_what_is_left_out(door):
    """Unset means the model's own defaults: greedy, all the room there is up to 256 tokens, its end tokens."""
    message = request("hello")
    message.ClearField("stopping")
    made, *_ = await door.request(message, "r", LIMITS, math.inf, None)

    assert made.max_output_count == 32 - 5
    assert made.sampling.temperature == 0
    assert made.stop_token_ids == {256}


@pytest.mark.parametrize("request_id", ["two words", "ü", "x" * 129, "tab\t"])
def test_refuses_an_id_that_logs_and_headers_cannot_carry(request_id):
    """Ids are how requests are found; one with a space or a line break is found nowhere."""
    with pytest.raises(RefusedError, match=r"request_id '.*' must be 1 to 128 printable ASCII"):
        request_id_of(request(request_id=request_id))


def test_makes_an_id_for_a_request_without_one():
    """Every request can be found, whether its caller cared or not."""
    assert request_id_of(request(request_id="mine")) == "mine"
    assert request_id_of(request()).startswith("req-")


async def test_who_asks_for_a_filter_asks_for_sampling(door):
    """On a model that is greedy by default a lone top_p would otherwise be ignored without a word."""
    made, *_ = await door.request(request(top_p=0.5), "r", LIMITS, math.inf, None)
    plain, *_ = await door.request(request(seed=3), "r", LIMITS, math.inf, None)

    assert (made.sampling.temperature, made.sampling.top_p) == (1.0, 0.5)
    assert plain.sampling.temperature == 0


async def test_ignoring_the_end_keeps_the_stop_tokens_of_the_request(door):
    """`ignore_eos` is about the model's end, not about what the caller asked to stop at."""
    made, *_ = await door.request(request(ignore_eos=True, stop_token_ids=[7]), "r", LIMITS, math.inf, None)

    assert made.stop_token_ids == {7}


async def test_draws_a_seed_for_a_request_without_one(door):
    """Recomputation must give the same tokens, so that even unseeded requests have a seed; two differ."""
    made = [await door.request(request(temperature=1), "r", LIMITS, math.inf, None) for _ in range(3)]

    assert len({one.sampling.seed for one, *_ in made}) == 3


def test_the_model_samples_by_default_where_its_generation_config_says_so():
    """Users expect the behaviour that the model's makers chose."""
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None}

    assert sampling_defaults(config) == {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "min_p": 0.0}
    assert sampling_defaults({"temperature": 0.6})["temperature"] == 0
    assert sampling_defaults({"do_sample": True, "top_k": -1})["top_k"] == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"temperature": "hot"}, "temperature is 'hot', must be a number"), ({"top_p": 3}, "top_p is 3, must be above 0")],
)
def test_refuses_a_model_whose_own_defaults_make_no_sense(config, reason):
    """Found at start, by the file's name; not by users, in an error about a field that they never set."""
    with pytest.raises(ValueError, match=f"generation_config.json: {reason}"):
        sampling_defaults({"do_sample": True} | config)
