"""KEDA asks us: every method of its contract, over a real server."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from autoscaler_svc.keda import ExternalScaler
from autoscaler_svc.load import ExecutorLoad, PoolLoad
from common.grpc_servers import Server
from externalscaler import externalscaler_pb2 as pb
from externalscaler import externalscaler_pb2_grpc
from tests.autoscaler_svc.keda_client import ScaledObject


class Known:
    """What an autoscaler would know; set it, and whoever waits is told."""

    def __init__(self) -> None:
        self.load: PoolLoad | None = PoolLoad(model="m")
        self.wanted: int | None = 0
        self.round_count = 0

    def tell(self, wanted: int | None, **load) -> None:
        self.wanted = wanted
        self.load = None if wanted is None else PoolLoad(model="m", **load)
        self.round_count += 1

    async def changed(self, since: int) -> None:
        while self.round_count == since:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def keda(tmp_path, known):
    """A server that answers by `known`, and a stub of KEDA's."""
    server, scaler = Server(), ExternalScaler(known)
    externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(scaler, server.grpc)
    await server.start([f"unix:{tmp_path}/keda.sock"], ["externalscaler.ExternalScaler"])
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/keda.sock") as channel:
        yield externalscaler_pb2_grpc.ExternalScalerStub(channel), scaler
    await server.stop()


def ref(**metadata) -> pb.ScaledObjectRef:
    return pb.ScaledObjectRef(name="e", namespace="n", scalerMetadata=metadata)


async def value(stub, **metadata) -> float:
    (spec,) = (await stub.GetMetricSpec(ref(**metadata))).metricSpecs
    asked = pb.GetMetricsRequest(scaledObjectRef=ref(**metadata), metricName=spec.metricName)
    (metric,) = (await stub.GetMetrics(asked)).metricValues
    assert metric.metricName == spec.metricName
    return metric.metricValueFloat


async def test_scales_from_nothing_to_what_is_wanted_and_back(tmp_path):
    """The whole of what KEDA does with us: activity from zero, the HPA beyond it, the cooldown to zero."""
    known = Known()
    async with keda(tmp_path, known) as (stub, _):
        scaled = ScaledObject(stub, {})
        assert await scaled.poll(0) == 0
        known.tell(3, waiting_request_count=40)
        assert await scaled.poll(30) == 3
        known.tell(2)
        assert await scaled.poll(60) == 2
        known.tell(0)
        assert await scaled.poll(90) == 1  # the HPA's least
        assert await scaled.poll(359) == 1
        assert await scaled.poll(361) == 0


async def test_missing_data_are_an_error_and_change_nothing(tmp_path):
    """A zero for an unknown load would end every executor of a scheduler that restarts."""
    known = Known()
    async with keda(tmp_path, known) as (stub, _):
        scaled = ScaledObject(stub, {})
        known.tell(4)
        assert await scaled.poll(0) == 4
        known.tell(None)
        assert await scaled.poll(30) == 4
        assert scaled.errors == [grpc.StatusCode.UNAVAILABLE]
        with pytest.raises(grpc.aio.AioRpcError, match="nothing is known of the load"):
            await stub.IsActive(ref())


async def test_values_are_totals_over_the_pool(tmp_path):
    """The HPA divides by the target; a mean would be divided twice."""
    known = Known()
    known.tell(5, waiting_request_count=3, running_request_count=4, waiting_token_count=100, running_token_count=11)
    async with keda(tmp_path, known) as (stub, _):
        assert await value(stub) == 5
        assert await value(stub, metric="requests", target="8") == 7
        assert await value(stub, metric="tokens", target="2048", pool="m", enableTLS="true", xFromEnv="y") == 111
        assert await value(stub, metric="backlog_seconds", target="0.5") == 0
        (spec,) = (await stub.GetMetricSpec(ref(metric="requests", target="7.5"))).metricSpecs
        assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == ("paceline-requests", 8, 7.5)


async def test_a_backlog_of_unknown_length_changes_nothing(tmp_path):
    """After a restart of the scheduler its speed is unknown; read as zero seconds it would end all but one executor."""
    known, metadata = Known(), {"metric": "backlog_seconds", "target": "2"}
    executors = tuple(ExecutorLoad(name) for name in "abcd")
    async with keda(tmp_path, known) as (stub, _):
        scaled = ScaledObject(stub, metadata)
        known.tell(4, backlog_token_count=9000)  # nobody is there: from zero to what is wanted
        assert await scaled.poll(0) == 4
        known.tell(4, backlog_token_count=9000, executors=executors)
        assert await scaled.poll(30) == 4
        assert scaled.errors == [grpc.StatusCode.UNAVAILABLE]
        known.tell(4, backlog_token_count=9000, backlog_s=1.0, executors=executors)
        assert await scaled.poll(60) == 2


async def test_two_triggers_have_their_own_metrics(tmp_path):
    """The HPA takes the larger wish of the two; one must not answer for the other."""
    known = Known()
    known.tell(3, waiting_request_count=40)
    async with keda(tmp_path, known) as (stub, _):
        assert await asyncio.gather(value(stub), value(stub, metric="requests", target="8")) == [3, 40]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"metric": "gpus"}, "metadata metric is 'gpus', must be one of executors, requests, tokens, backlog_seconds"),
        ({"metric": "requests"}, "metadata target is '', must be a number of at least 0.001"),
        ({"metric": "requests", "target": "ten"}, "metadata target is 'ten'"),
        ({"metric": "requests", "target": "0"}, "metadata target is '0'"),
        ({"target": "1e30"}, "metadata target is '1e30'"),
        ({"target": "nan"}, "metadata target is 'nan'"),
        ({"metrics": "requests"}, "metadata has 'metrics'; there are metric, target and pool"),
        ({"pool": "other"}, "metadata pool is 'other', this autoscaler has 'm'"),
    ],
)
async def test_wrong_metadata_are_refused_by_name(tmp_path, metadata, message):
    """A typing error in a trigger shows in the ScaledObject's condition, not in the number of executors."""
    async with keda(tmp_path, Known()) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.IsActive(ref(**metadata))
        with pytest.raises(grpc.aio.AioRpcError) as streamed:
            async for _ in stub.StreamIsActive(ref(**metadata)):
                pass

    for error in (refusal.value, streamed.value):
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert message in error.details()


async def test_a_metric_that_was_not_offered_is_refused(tmp_path):
    """Another trigger's name is a mistake of whoever asks, and no zero."""
    async with keda(tmp_path, Known()) as (stub, _):
        asked = pb.GetMetricsRequest(scaledObjectRef=ref(), metricName="s0-paceline-executors")
        with pytest.raises(grpc.aio.AioRpcError, match="this trigger has only 'paceline-executors'"):
            await stub.GetMetrics(asked)


async def test_pushes_the_present_state_and_then_each_change(tmp_path):
    """From zero nobody waits for a poll every thirty seconds."""
    known = Known()
    async with keda(tmp_path, known) as (stub, _):
        scaled = ScaledObject(stub, {})
        call = stub.StreamIsActive(ref())
        assert (await call.read()).result is False
        known.tell(0, waiting_request_count=1)  # before anything was decided
        message = await asyncio.wait_for(call.read(), 5)
        scaled.push(1.0, message.result)
        assert scaled.replicas == 1
        known.tell(2, waiting_request_count=9)  # no change of what was told
        known.tell(0)
        assert (await asyncio.wait_for(call.read(), 5)).result is False
        call.cancel()


async def test_a_stream_that_opens_before_anything_is_known_waits(tmp_path):
    """An error would make KEDA wait longer and longer before it opens the next."""
    known = Known()
    known.tell(None)
    async with keda(tmp_path, known) as (stub, _):
        call = stub.StreamIsActive(ref())
        reading = asyncio.ensure_future(call.read())
        await asyncio.sleep(0.1)
        assert not reading.done()
        known.tell(1)
        assert (await asyncio.wait_for(reading, 5)).result is True
        call.cancel()


async def test_streams_end_cleanly_when_the_autoscaler_leaves(tmp_path):
    """Only a clean end makes KEDA come back soon."""
    async with keda(tmp_path, Known()) as (stub, scaler):
        active, specs = stub.StreamIsActive(ref()), stub.StreamMetricSpec(ref())
        await active.read()
        assert (await specs.read()).metricSpecs[0].targetSizeFloat == 1
        scaler.close()

        for call in (active, specs):
            assert await asyncio.wait_for(call.read(), 5) is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK


async def test_the_tolerance_of_the_hpa_is_why_it_should_be_zero(tmp_path):
    """Of ten executors and more it ignores a step of one: documented, and held here so that the document stays true."""
    known = Known()
    async with keda(tmp_path, known) as (stub, _):
        usual, exact = ScaledObject(stub, {}, most=40), ScaledObject(stub, {}, most=40, tolerance=0.0)
        known.tell(20)
        assert [await one.poll(0) for one in (usual, exact)] == [20, 20]
        known.tell(21)
        assert [await one.poll(30) for one in (usual, exact)] == [20, 21]
