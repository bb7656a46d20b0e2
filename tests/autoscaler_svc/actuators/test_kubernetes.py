"""The actuator with the real client over HTTP, against an emulator that stores objects and has no controllers."""

from __future__ import annotations

import asyncio
import builtins
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

kmock = pytest.importorskip("kmock")
client = pytest.importorskip("kubernetes.client")

from autoscaler_svc.actuators.actuator import ActuatorError, Launched, NoRoomError  # noqa: E402
from autoscaler_svc.actuators.kubernetes import KubernetesActuator  # noqa: E402

SCALE = "/apis/apps/v1/namespaces/default/deployments/small/scale"
COST = "controller.kubernetes.io/pod-deletion-cost"
MARKS = {COST: "-1000", "paceline.dev/scaled-down": "true"}


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[Any]:
    cluster = kmock.KubernetesEmulator()
    cluster.resources["v1/pods"] = {}
    cluster.fallback[f"put {SCALE}"] << (lambda request: put_scale(cluster, request.data))
    async with kmock.Server(cluster):
        yield cluster


@pytest_asyncio.fixture
async def actuator(cluster: Any) -> AsyncIterator[KubernetesActuator]:
    actuator = make_actuator(str(cluster.url))
    yield actuator
    await actuator.close()


def make_actuator(url: str, **settings: Any) -> KubernetesActuator:
    return KubernetesActuator({"cpu": "small"}, configuration=client.Configuration(host=url.rstrip("/")), **settings)


def put_scale(cluster: Any, scale: Any) -> Any:
    """What the emulator leaves out: a change is refused whose object is not the latest."""
    if scale["metadata"]["resourceVersion"] != version(cluster):
        code, body = status(409, "Conflict", "the object has been modified")
        return kmock.Response(status=code, payload=body)
    set_replicas(cluster, scale["spec"]["replicas"])
    return kmock.Response(status=200, payload=scale)


def set_replicas(cluster: Any, count: int) -> None:
    metadata = {"resourceVersion": str(int(version(cluster)) + 1)}
    deployment(cluster).patch({"metadata": metadata, "spec": {"replicas": count}})


def deployment(cluster: Any) -> Any:
    return cluster.objects["apps/v1/deployments", "default", "small"]


def version(cluster: Any) -> str:
    return deployment(cluster)["metadata"]["resourceVersion"]


def add_deployment(cluster: Any, replicas: int, **status: Any) -> None:
    cluster.objects["apps/v1/deployments", "default", "small"] = {
        "metadata": {
            "name": "small",
            "namespace": "default",
            "resourceVersion": "7",
            "managedFields": [{"subresource": "scale", "time": ago(90)}, {"subresource": "status", "time": ago(1)}],
        },
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "small", "part": "executor"}},
            "template": {"metadata": {"labels": {"app": "small"}}, "spec": {"containers": [{"name": "executor"}]}},
        },
        "status": {"replicas": replicas} | status,
    }


def add_pod(
    cluster: Any, name: str, *, phase: str = "Running", age_s: float = 60, container: Any = None, **more: Any
) -> None:
    state = {"state": {"running": {"startedAt": ago(1)}}} if container is None else container
    base = {"name": "executor", "image": "i", "imageID": "i", "ready": False, "restartCount": 0}
    cluster.objects["v1/pods", "default", name] = {
        "metadata": {"name": name, "creationTimestamp": ago(age_s), **more.pop("metadata", {})},
        "spec": {"containers": [{"name": "executor"}]},
        "status": {"phase": phase, "containerStatuses": [base | state] if state else [], **more},
    }


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def replicas(cluster: Any) -> int:
    return deployment(cluster)["spec"]["replicas"]


def annotations(cluster: Any, pod: str) -> dict[str, str]:
    return cluster.objects["v1/pods", "default", pod].get("metadata", {}).get("annotations", {})


def status(code: int, reason: str, message: str) -> Any:
    """What an API server says to refuse something."""
    return code, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code}


def answer(cluster: Any, request: str, refusal: Any, count: int | None = None) -> Any:
    """Have the first `count` such requests refused, or all."""
    code, body = refusal
    return cluster[request][:count] << code << body if count is not None else cluster[request] << code << body


def writes(cluster: Any) -> list[tuple[str, str]]:
    return [(request.method.value, request.url.path) for request in cluster if request.method.value != "GET"]


async def only(actuator: KubernetesActuator) -> Launched:
    (one,) = await actuator.list()
    return one


# --- list -------------------------------------------------------------------------------------------------------


async def test_pods_of_the_deployment_are_listed(cluster: Any, actuator: KubernetesActuator):
    """An executor joins under the name of its pod."""
    add_deployment(cluster, 2)
    add_pod(cluster, "small-b", age_s=120)
    add_pod(cluster, "small-a", age_s=60)

    first, second = await actuator.list()

    assert (first.executor_id, second.executor_id) == ("small-a", "small-b")
    assert (first.node_type, first.is_running, first.is_retired, first.last_failure) == ("cpu", True, False, "")
    assert 55 < first.age_s < 90
    assert 115 < second.age_s < 150
    assert cluster["list"][0].params["labelSelector"] == "app=small,part=executor"


async def test_pods_that_end_or_have_ended_are_not_listed(cluster: Any, actuator: KubernetesActuator):
    """Kubernetes does not count them either: others take their place, and all would be one too many."""
    add_deployment(cluster, 1)
    add_pod(cluster, "small-a", metadata={"deletionTimestamp": ago(1), "finalizers": ["none"]})
    add_pod(cluster, "small-b", phase="Failed", reason="Evicted")
    add_pod(cluster, "small-c")

    assert (await only(actuator)).executor_id == "small-c"


@pytest.mark.parametrize(
    ("container", "failure"),
    [
        ({"state": {"waiting": {"reason": "ContainerCreating"}}}, ""),
        ({"state": {"waiting": {"reason": "ImagePullBackOff"}}}, "ImagePullBackOff"),
        (
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            },
            "CrashLoopBackOff: back-off 10s; ended with exit code 137 (OOMKilled)",
        ),
    ],
)
async def test_a_pod_says_why_it_does_not_run(
    cluster: Any, actuator: KubernetesActuator, container: dict[str, Any], failure: str
):
    """A failure that lasts is replaced; a container that is being made is none."""
    add_deployment(cluster, 1)
    add_pod(cluster, "small-a", container=container)

    one = await only(actuator)

    assert (one.is_running, one.last_failure) == (False, failure)


async def test_waiting_for_a_node_is_a_failure_after_a_while(cluster: Any):
    """A node that is added to a cluster takes minutes; who gives up before that never gets one."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes fit"}
    add_deployment(cluster, 1)
    add_pod(cluster, "small-a", phase="Pending", age_s=60, container={}, conditions=[condition])
    patient, hasty = make_actuator(str(cluster.url)), make_actuator(str(cluster.url), node_wait_s=30)

    waits, gives_up = await only(patient), await only(hasty)

    assert (waits.is_running, waits.last_failure) == (False, "")
    assert (gives_up.is_running, gives_up.last_failure) == (False, "Unschedulable: 0/3 nodes fit")
    await patient.close()
    await hasty.close()


async def test_what_has_no_pod_yet_is_listed_all_the_same(cluster: Any, actuator: KubernetesActuator):
    """What was asked for must not be asked for twice; what stands in the way is for people to read."""
    message = "pods 'small-' is forbidden: exceeded quota: gpus"
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    add_deployment(cluster, 3, conditions=[condition])
    add_pod(cluster, "small-a")

    _, *pending = await actuator.list()

    assert [one.executor_id for one in pending] == ["small-pending-0", "small-pending-1"]
    assert not pending[0].is_running
    assert 85 < pending[0].age_s < 120
    assert pending[0].last_failure == f"FailedCreate: {message}"


# --- launch -----------------------------------------------------------------------------------------------------


async def test_a_launch_is_one_replica_more(cluster: Any, actuator: KubernetesActuator):
    """The version that was read goes with it: somebody else's change is not overwritten."""
    add_deployment(cluster, 2)

    name = await actuator.launch("cpu")

    assert name == ""
    assert replicas(cluster) == 3
    assert writes(cluster) == [("PUT", SCALE)]
    assert cluster["put"][0].data["metadata"]["resourceVersion"] == "7"


async def test_launches_at_the_same_time_all_count(cluster: Any, actuator: KubernetesActuator):
    """A scale-up is several launches at once."""
    add_deployment(cluster, 0)

    await asyncio.gather(*(actuator.launch("cpu") for _ in range(4)))

    assert replicas(cluster) == 4


async def test_a_conflict_is_read_again_and_tried_again(cluster: Any, actuator: KubernetesActuator):
    """Two others were faster; what they asked for stands, and this comes on top."""
    add_deployment(cluster, 2)
    others = iter([5, 6])
    cluster[f"get {SCALE}"][:2] << (lambda: read_before(cluster, next(others)))

    await actuator.launch("cpu")

    sent = [(one.data["metadata"]["resourceVersion"], one.data["spec"]["replicas"]) for one in cluster["put"]]
    assert sent == [("7", 3), ("8", 6), ("9", 7)]
    assert replicas(cluster) == 7


def read_before(cluster: Any, count: int) -> Any:
    """The scale as it is before somebody else sets it to `count`."""
    scale = deployment(cluster).raw
    set_replicas(cluster, count)
    return scale


async def test_conflicts_without_end_are_given_up(cluster: Any, actuator: KubernetesActuator):
    """The loop comes round again; it must not be stuck in here."""
    add_deployment(cluster, 2)
    answer(cluster, f"put {SCALE}", status(409, "Conflict", "the object has been modified"))

    with pytest.raises(ActuatorError, match=r"replace deployment/small/scale .*409.*modified.*5 times in a row"):
        await actuator.launch("cpu")

    assert len(cluster["put"]) == 5


async def test_a_quota_is_no_room(cluster: Any, actuator: KubernetesActuator):
    """Another node type may have room; a missing permission is told from it."""
    add_deployment(cluster, 2)
    answer(cluster, f"put {SCALE}", status(403, "Forbidden", "exceeded quota: executors, limited: 2"), count=1)
    answer(cluster, f"put {SCALE}", status(403, "Forbidden", "user 'autoscaler' cannot update deployments/scale"))

    with pytest.raises(NoRoomError, match="exceeded quota: executors, limited: 2"):
        await actuator.launch("cpu")
    with pytest.raises(ActuatorError, match="cannot update deployments/scale") as refusal:
        await actuator.launch("cpu")

    assert not isinstance(refusal.value, NoRoomError)


async def test_an_unknown_node_type_is_refused(actuator: KubernetesActuator):
    """Nothing is started at random."""
    with pytest.raises(ActuatorError, match="no Deployment for node type 'h100'"):
        await actuator.launch("h100")


# --- retire and terminate ---------------------------------------------------------------------------------------


async def test_a_retired_pod_is_the_first_to_go(cluster: Any, actuator: KubernetesActuator):
    """Kubernetes is told which one is drained, long before the number is reduced."""
    add_deployment(cluster, 1)
    add_pod(cluster, "small-a")

    await actuator.retire("small-a")

    assert annotations(cluster, "small-a") == {COST: "-1000"}
    assert replicas(cluster) == 1
    assert (await only(actuator)).is_retired


async def test_retiring_one_that_is_gone_is_no_error(cluster: Any, actuator: KubernetesActuator):
    """A repeated wish must be harmless."""
    add_pod(cluster, "small-a")
    answer(cluster, "patch /api/v1/namespaces/default/pods/small-a", status(404, "NotFound", "no pod small-a"))

    await actuator.retire("small-a")

    assert len(cluster["patch"]) == 1


async def test_a_pod_is_marked_before_the_number_is_reduced(cluster: Any, actuator: KubernetesActuator):
    """In the other order Kubernetes would have chosen by then."""
    add_deployment(cluster, 2)
    add_pod(cluster, "small-a")
    add_pod(cluster, "small-b")

    await actuator.terminate("small-a")

    assert writes(cluster) == [("PATCH", "/api/v1/namespaces/default/pods/small-a"), ("PUT", SCALE)]
    assert annotations(cluster, "small-a") == MARKS
    assert replicas(cluster) == 1
    assert (await only(actuator)).executor_id == "small-b"


async def test_terminating_twice_reduces_once(cluster: Any, actuator: KubernetesActuator):
    """The pod may take a while to go, and the autoscaler may be restarted meanwhile."""
    add_deployment(cluster, 2)
    add_pod(cluster, "small-a")
    add_pod(cluster, "small-b")

    await actuator.terminate("small-a")
    await actuator.terminate("small-a")

    assert replicas(cluster) == 1


async def test_one_that_is_gone_reduces_nothing(cluster: Any, actuator: KubernetesActuator):
    """Its place was taken by another, which nobody asked to end; whether it went before the mark or with it."""
    add_deployment(cluster, 1)
    add_pod(cluster, "small-b")
    await actuator.terminate("small-a")
    answer(cluster, "patch /api/v1/namespaces/default/pods/small-b", status(404, "NotFound", "no pod small-b"))
    await actuator.terminate("small-b")

    assert replicas(cluster) == 1
    assert not cluster["put"]


async def test_a_mark_without_a_reduction_is_made_good(cluster: Any, actuator: KubernetesActuator):
    """An autoscaler that ended in between leaves a retired executor, which its successor terminates."""
    add_deployment(cluster, 2)
    add_pod(cluster, "small-a", metadata={"annotations": MARKS})
    add_pod(cluster, "small-b")

    before = await actuator.list()
    await actuator.terminate("small-a")
    after = await actuator.list()

    assert [(one.executor_id, one.is_retired) for one in before] == [("small-a", True), ("small-b", False)]
    assert replicas(cluster) == 1
    assert [one.executor_id for one in after] == ["small-b"]


async def test_a_pod_that_survives_its_termination_is_listed_again(cluster: Any, actuator: KubernetesActuator):
    """Deletion costs are a best effort: Kubernetes takes pods that do not run yet before any other."""
    add_deployment(cluster, 2)
    add_pod(cluster, "small-a")
    add_pod(cluster, "small-b", phase="Pending", container={})
    await actuator.terminate("small-a")
    cluster.objects["v1/pods", "default", "small-b"].delete()

    one = await only(actuator)

    assert (one.executor_id, one.is_retired) == ("small-a", True)


async def test_giving_up_what_has_no_pod_reduces_the_number(cluster: Any, actuator: KubernetesActuator):
    """And nothing when the pod has come meanwhile: it would be another that goes."""
    add_deployment(cluster, 2)
    add_pod(cluster, "small-a")

    await actuator.terminate("small-pending-0")
    await actuator.terminate("small-pending-0")

    assert writes(cluster) == [("PUT", SCALE)]
    assert replicas(cluster) == 1


# --- failures ---------------------------------------------------------------------------------------------------


async def test_a_deployment_that_is_missing_is_named(cluster: Any, actuator: KubernetesActuator):
    """A typing mistake in the scaling file is found by its message."""
    missing = status(404, "NotFound", 'deployments.apps "small" not found')
    answer(cluster, "get /apis/apps/v1/namespaces/default/deployments/small", missing)

    with pytest.raises(ActuatorError, match=r"get deployment/small in namespace 'default': 404 .*\"small\" not found"):
        await actuator.list()


async def test_a_server_that_does_not_answer_is_not_waited_for():
    """One hung call would stop every later decision."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        actuator = make_actuator(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1)

        with pytest.raises(ActuatorError, match=r"not answered 'get' of deployment/small .* within 0\.1 s"):
            await actuator.list()
        await actuator.close()


async def test_a_server_that_is_not_there_is_an_actuator_error():
    """The autoscaler goes on and tries again; any other exception would end it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    actuator = make_actuator(f"http://127.0.0.1:{port}")

    with pytest.raises(ActuatorError, match="does not answer 'get' of deployment/small"):
        await actuator.list()
    await actuator.close()


def test_without_a_cluster_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch):
    """Found at the start, and not with the first look."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/nowhere/config")

    with pytest.raises(ActuatorError, match="set KUBECONFIG"):
        KubernetesActuator({"cpu": "small"})


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    """The client is an extra; most installations do without."""
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "autoscaler_svc.actuators.kubernetes_api":
            raise ImportError("No module named 'kubernetes'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(ActuatorError, match=r"pip install 'paceline-server\[kubernetes\]'"):
        KubernetesActuator({"cpu": "small"})
