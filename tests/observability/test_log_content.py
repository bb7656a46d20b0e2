"""What users say does not get into the log, whatever goes wrong with it."""

import io
import sys

import grpc
import pytest
import structlog

from common.logs import configure_logs
from executor_svc.fake import FakeRunner
from scheduler_svc.door import Door
from tests.system import FAST, request, started

PROMPT = "their secret"


class Errors(io.StringIO):
    """Takes what goes to stderr, which is a terminal, or is none."""

    def __init__(self, is_terminal):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def printed(request, monkeypatch):
    """The log as the services write it."""
    errors = Errors(request.param)
    monkeypatch.setattr(sys, "stderr", errors)
    configure_logs("scheduler", "debug")
    yield errors
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class BrokenRunner(FakeRunner):
    """Fails with what it is to compute in its hands."""

    def run(self, batch):
        tokens, said = list(batch.token_ids), PROMPT
        raise ZeroDivisionError(f"a mistake in a kernel for {len(tokens)} tokens of {type(said).__name__}")


async def ask(system):
    """A request that fails."""
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in system.generate(request(PROMPT, 4)):
            pass


async def test_a_call_that_fails_by_a_mistake_of_ours_keeps_the_prompt_to_itself(printed, monkeypatch):
    """The traceback is needed, the values of its variables are the user's: the message itself is one of them."""

    def fail(_self, message):
        size = len(message.text)
        raise KeyError(f"a mistake with {size} characters")

    monkeypatch.setattr(Door, "_read", fail)
    async with started() as system:
        await ask(system)

    assert "call failed" in printed.getvalue()
    assert "a mistake with 12 characters" in printed.getvalue()
    assert PROMPT not in printed.getvalue()


async def test_a_step_that_fails_keeps_the_prompt_to_itself(printed):
    """The executor's log is read by whoever runs the machine."""
    async with started(0) as system:
        system.add_executor(FAST, BrokenRunner(FAST))
        await system.ready()
        await ask(system)

    assert "a mistake in a kernel" in printed.getvalue()
    assert PROMPT not in printed.getvalue()


def test_an_observation_that_is_lost_keeps_the_prompt_to_itself(printed):
    """Whatever fails beside the requests has them at hand."""
    text = PROMPT
    try:
        raise ZeroDivisionError(f"a mistake after {len(text)} characters")
    except ZeroDivisionError:
        structlog.get_logger().exception("what was observed is lost; serving goes on")

    assert "a mistake after 12 characters" in printed.getvalue()
    assert PROMPT not in printed.getvalue()
