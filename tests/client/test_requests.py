"""What goes over the wire, and what is refused before it does."""

import inspect
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import paceline
from paceline import InvalidRequest, Model
from paceline._calls import traceparent
from paceline._requests import generate_request
from paceline.types import Options
from tests.client.scripted_server import end_of_choice, last

OPTIONS = {
    "max_output_tokens": 16,
    "temperature": 0.5,
    "top_k": 40,
    "top_p": 0.25,
    "min_p": 0.125,
    "seed": 2**64 - 1,
    "stop": ["\n", "END"],
    "stop_token_ids": [4, 5],
    "ignore_eos": True,
}
PLACE = {"n": 4, "priority": -7, "tenant": "acme", "cache_salt": "sälz"}  # fields of the request itself


def test_sends_every_option(client, server):
    """An option that gets lost on the way changes the answers silently."""
    server.scripts.append((*[end_of_choice("", choice=index) for index in range(3)], last("", choice=3)))
    client.generate("Say hello", stream=False, request_id="mine", **OPTIONS, **PLACE)

    (request,) = server.requests
    assert (request.text, request.request_id) == ("Say hello", "mine")
    sampling, stopping = request.sampling, request.stopping
    assert {field.name: value for field, value in [*sampling.ListFields(), *stopping.ListFields()]} == OPTIONS
    assert (request.choice_count, request.priority, request.tenant, request.cache_salt) == tuple(PLACE.values())


def test_every_option_is_one_that_is_sent():
    """The documented options, those that a request takes and those of the test above are the same."""
    of_the_client = {"model", "detach_timeout_s"}
    taken = set(inspect.signature(generate_request).parameters) - {"prompt", "messages"} - of_the_client

    assert taken == set(Options.__annotations__) == {*OPTIONS, *PLACE, "request_id"}


def test_leaves_unset_what_the_caller_left_out(client, server):
    """Unset means the model's own default; a 0 in its place would mean something else."""
    client.generate("Say hello", stream=False, temperature=None)

    assert not server.requests[0].HasField("sampling")
    assert not server.requests[0].HasField("stopping")
    assert {field.name for field, _ in server.requests[0].ListFields()} == {"request_id", "text", "detach_timeout_s"}


def test_leaves_the_count_of_choices_unset_for_one(client, server):
    """One continuation is what everybody gets; servers from before there were more understand it."""
    client.generate("Say hello", stream=False, n=1)

    assert server.requests[0].choice_count == 0


def test_sends_a_zero_that_the_caller_asked_for(client, server):
    """`temperature=0` is greedy and `seed=0` a seed; neither is "unset"."""
    client.generate("Say hello", stream=False, temperature=0, seed=0)

    assert server.requests[0].sampling.HasField("temperature")
    assert server.requests[0].sampling.HasField("seed")


def test_leaves_nan_to_the_server(client, server):
    """Values are checked in one place, and the server has to check them anyway."""
    client.generate("Say hello", stream=False, temperature=math.nan)

    assert math.isnan(server.requests[0].sampling.temperature)


def test_sends_token_ids_in_little_endian(client, server):
    """The wire has one byte order, whatever machine the caller has."""
    client.generate([1, 65_536, 2**32 - 1], stream=False)

    assert server.requests[0].token_ids.ids == b"\1\0\0\0\0\0\1\0\xff\xff\xff\xff"


def test_sends_an_empty_prompt_as_what_it_is(client, server):
    """The server refuses it by name; an unset prompt would be refused with a riddle."""
    client.generate([], stream=False)
    client.generate("", stream=False)
    client.chat([], stream=False)

    assert [request.WhichOneof("prompt") for request in server.requests] == ["token_ids", "text", "chat"]


def test_chat_takes_a_conversation_or_one_message(client, server):
    """One question should not need a list of a dict."""
    client.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], stream=False)
    client.chat("Hi", stream=False, max_output_tokens=4)

    first, second = ([(m.role, m.content) for m in request.chat.messages] for request in server.requests)
    assert first == [("system", "Be brief."), ("user", "Hi")]
    assert second == [("user", "Hi")]
    assert server.requests[1].stopping.max_output_tokens == 4


def test_one_stop_text_is_not_taken_for_its_characters(client, server):
    """`stop="END"` is a mistake that everybody makes, so it is none."""
    client.generate("Say hello", stream=False, stop="END")

    assert list(server.requests[0].stopping.stop) == ["END"]


def test_asks_for_the_model_of_the_client(connect, server):
    """A client that is pointed at another model's server must be told."""
    connect(model="tiny").generate("Say hello", stream=False)

    assert server.requests[0].model == "tiny"


def test_speaks_for_the_tenant_of_the_client(connect, server):
    """A service makes one client for each of its customers; a forgotten argument must not mix them."""
    client = connect(tenant="acme", cache_salt="pepper")
    client.generate("Say hello", stream=False)
    client.chat("Hi", stream=False, tenant=None)
    client.generate("Say hello", stream=False, tenant="other", cache_salt="")
    client.generate_batch(["a", {"prompt": "b", "tenant": "other", "cache_salt": None}])

    batch = [message.request for message in server.batches[0]]
    sent = [(request.tenant, request.cache_salt) for request in [*server.requests, *batch]]
    assert sent == [
        ("acme", "pepper"),
        ("acme", "pepper"),
        ("other", ""),
        ("acme", "pepper"),
        ("other", "pepper"),
    ]


def test_gives_each_request_an_id_of_its_own(client, server):
    """Errors, logs and `cancel` need it, also when the server never answered."""
    ids = {client.generate("Say hello").request_id for _ in range(3)}

    assert len(ids) == 3
    assert all(re.fullmatch(r"req-[0-9a-f]{32}", request_id) for request_id in ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a\ud800"}, r"prompt has the lone surrogate '\\ud800' at position 1.*errors='replace'"),
        ({"prompt": b"abc"}, "prompt must be token ids, got bytes; pass text as str"),
        ({"prompt": 7}, "prompt must be a sequence of token ids, got 7"),
        ({"prompt": None}, "either a prompt or messages"),
        ({"prompt": [1, -2]}, r"prompt\[1\] must be an integer from 0 to 4294967295, got -2"),
        ({"prompt": [2**32]}, r"prompt\[0\] must be .*, got 4294967296"),
        ({"prompt": [1, 2.0]}, r"prompt\[1\] must be an integer from 0 to 4294967295, got 2.0"),
        ({"prompt": [{"role": "user"}]}, r"messages\[0\] must be a dict of 'role' and 'content', got {'role': 'user'}"),
        ({"prompt": [{"role": "user", "content": 3}]}, r"messages\[0\]\['content'\] must be a str, got 3"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_k": -1}, "top_k must be an integer from 0 to 4294967295, got -1"),
        ({"seed": 2**64}, "seed must be an integer from 0 to 18446744073709551615"),
        ({"max_output_tokens": 1.5}, "max_output_tokens must be an integer from 0 to 4294967295, got 1.5"),
        ({"ignore_eos": "yes"}, "ignore_eos must be True or False, got 'yes'"),
        ({"stop": ["a", None]}, r"stop\[1\] must be a str, got None"),
        ({"stop": 3}, "stop must be a sequence of texts, got 3"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids\[0\] must be an integer from 0 to 4294967295, got -1"),
        ({"request_id": 7}, "request_id must be a str, got 7"),
        ({"n": 0}, "n must be a whole number of choices, at least 1, got 0"),
        ({"n": 2**32}, "n must be a whole number of choices, at least 1, got 4294967296"),
        ({"n": 1.5}, "n must be a whole number of choices, at least 1, got 1.5"),
        ({"priority": 2**31}, "priority must be an integer from -2147483648 to 2147483647, got 2147483648"),
        ({"priority": "high"}, "priority must be an integer from -2147483648 to 2147483647, got 'high'"),
        ({"tenant": 0}, "tenant must be a str, got 0"),
        ({"cache_salt": b"pepper"}, "cache_salt must be a str, got b'pepper'"),
    ],
)
def test_refuses_what_no_message_can_carry(client, server, arguments, message):
    """The error names the field and the value; protobuf's own names neither."""
    with pytest.raises(InvalidRequest, match=message):
        client.generate(**{"prompt": "Say hello", **arguments})
    assert server.requests == []


def test_cancels_by_id(client, server):
    """One process starts requests, another stops them."""
    client.cancel("mine")

    assert server.cancelled_ids == ["mine"]


def test_describes_the_model(client, server):
    """Callers size their prompts by it."""
    assert client.model() == Model("tiny", 2048, 1000, (2, 3), True, 1)


def test_starts_a_trace_with_each_call(client, server):
    """Client, scheduler and executor are one trace, also for callers who never heard of tracing."""
    client.generate("Say hello", stream=False)
    client.generate_batch(["a"])
    client.model()

    assert len(set(server.traceparents)) == 3
    assert all(re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", parent) for parent in server.traceparents)


def test_joins_the_trace_of_a_program_that_uses_opentelemetry(monkeypatch):
    """The request is then part of the caller's own trace, recorded if that is."""
    context = SimpleNamespace(is_valid=True, trace_id=0xABC, span_id=0xDEF, trace_flags=1)
    span = SimpleNamespace(get_span_context=lambda: context)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", SimpleNamespace(get_current_span=lambda: span))

    assert traceparent() == "00-00000000000000000000000000000abc-0000000000000def-01"


def test_imports_nothing_but_grpc_and_protobuf():
    """The SDK goes into other people's programs: it must not bring a framework along, nor load one that is there."""
    report = "import sys, paceline; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout.split()
    )
    at_start = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True)
    brought = loaded - sys.stdlib_module_names - {name.partition(".")[0] for name in at_start.stdout.split()}

    of_grpc = {"grpc_tools", "grpc_status", "grpc_health", "grpc_reflection", "cython_runtime", "typing_extensions"}
    assert {name for name in brought if not name.startswith("_cython")} <= {"paceline", "grpc", "google", *of_grpc}


def test_exports_what_it_names():
    """`from paceline import *` and the documentation agree."""
    assert all(hasattr(paceline, name) for name in paceline.__all__)
    assert paceline.__all__ == sorted(paceline.__all__)
