"""What calls pass on their way in and out of the scheduler."""

import asyncio
import contextlib

import grpc
import pytest
import structlog.testing

from common.errors import RefusedError
from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from scheduler_svc.interceptors import ReadContext, TellErrors, traceparent

HEADER = "00-{:032x}-0123456789abcdef-01"


class Service(InferenceServiceServicer):
    """Answers with what it was called in, or fails as it was told."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.was_left = asyncio.Event()

    async def Generate(self, request, context):
        try:
            for _ in range(3):
                await asyncio.sleep(0.001)
                yield pb.GenerateResponse(text=traceparent() or "nothing")
            if self.failure:
                raise self.failure
            await asyncio.sleep(60 if request.request_id == "endless" else 0)
        finally:
            self.was_left.set()

    async def GenerateBatch(self, request_iterator, context):
        message = await context.read()
        await context.write(pb.GenerateBatchResponse(index=message.index))
        if self.failure:
            raise self.failure

    async def GetModel(self, request, context):
        if self.failure:
            raise self.failure
        return pb.GetModelResponse(model=pb.Model(name=traceparent() or "nothing"))


@contextlib.asynccontextmanager
async def served(*settings):
    service = Service()
    server = grpc.aio.server(interceptors=[ReadContext(), TellErrors(*settings)])
    add_InferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield service, InferenceServiceStub(channel), channel
    await server.stop(0)


async def test_calls_side_by_side_each_know_their_own_trace():
    """One call's spans in another one's trace would be worse than none."""

    async def texts(stub, number):
        call = stub.Generate(pb.GenerateRequest(), metadata=[("traceparent", HEADER.format(number))])
        return {message.text async for message in call}

    async with served() as (_, stub, _):
        seen = await asyncio.gather(*(texts(stub, number) for number in range(20)))
        unnamed = await stub.GetModel(pb.GetModelRequest())

    assert seen == [{HEADER.format(number)} for number in range(20)]
    assert unnamed.model.name == "nothing"


async def every_kind_of_call(stub):
    """The statuses of a call that answers once, one that streams, and one that reads and writes."""
    batch = stub.GenerateBatch()
    await batch.write(pb.GenerateBatchRequest(index=7))
    for answer in (stub.GetModel(pb.GetModelRequest()), read(stub.Generate(pb.GenerateRequest())), read(batch)):
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await answer
        yield ended.value


async def read(call):
    return [message async for message in call]


async def test_a_refusal_reaches_the_caller_with_its_status_and_when_to_try_again():
    """Handlers raise and need not know gRPC; callers back off by what they are told."""
    async with served() as (service, stub, _):
        service.failure = RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_after_s=2.0)
        errors = [error async for error in every_kind_of_call(stub)]

    assert len(errors) == 3
    for error in errors:
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        assert "grpc-status-details-bin" in dict(error.trailing_metadata())


async def test_a_mistake_of_ours_is_told_as_one_and_its_reason_stays_in_the_log():
    """What a handler trips over may hold what another user has sent."""
    async with served() as (service, stub, _):
        service.failure = KeyError("the secret of another user")
        with structlog.testing.capture_logs() as logs:
            errors = [error async for error in every_kind_of_call(stub)]

    assert [error.code() for error in errors] == [grpc.StatusCode.INTERNAL] * 3
    assert all("KeyError" in error.details() and "secret" not in error.details() for error in errors)
    assert [line["event"] for line in logs] == ["call failed"] * 3
    assert all(isinstance(line["exc_info"], KeyError) for line in logs)


async def test_a_message_that_cannot_be_read_is_refused_with_the_reason():
    """gRPC would say INTERNAL and nothing more, and the user would look for the mistake on our side."""
    unreadable = []
    async with served(lambda method, error: unreadable.append((method, error.code))) as (_, _, channel):
        for method, kind in (("GetModel", channel.unary_unary), ("Generate", channel.unary_stream)):
            call = kind(f"/paceline.v1.InferenceService/{method}")(b"\x0a\xff")
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await (call if method == "GetModel" else read(call))
            assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "the message of 2 bytes cannot be read" in ended.value.details()

    refused = grpc.StatusCode.INVALID_ARGUMENT
    assert unreadable == [(f"/paceline.v1.InferenceService/{method}", refused) for method in ("GetModel", "Generate")]


async def test_a_caller_that_goes_away_ends_the_handler():
    """What it holds for the caller is given back at once, not when memory is cleared up."""
    async with served() as (service, stub, _):
        call = stub.Generate(pb.GenerateRequest(request_id="endless"))
        await call.read()
        call.cancel()
        await asyncio.wait_for(service.was_left.wait(), 10)
