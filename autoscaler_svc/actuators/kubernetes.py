"""Executors as pods of Kubernetes: a Deployment for each node type, whose replicas are what was asked for."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoscaler_svc.actuators.actuator import ActuatorError, Launched
from autoscaler_svc.actuators.kubernetes_objects import (
    DELETION_COST,
    FIRST_TO_GO,
    SCALED_DOWN,
    ConflictError,
    Deployment,
    GoneError,
    Pod,
    seconds_since,
)

if TYPE_CHECKING:
    from autoscaler_svc.actuators.kubernetes_api import KubernetesApi

_TIMEOUT_S = 5.0
_NODE_WAIT_S = 300.0
_TRIES = 5
_FIRST_PAUSE_S = 0.05
_PLACEHOLDER = re.compile(r"(.+)-pending-[0-9]+")


class KubernetesActuator:
    """An `Actuator` by the replicas of Deployments; a pod is an executor and has its name.

    Replicas are a number and name nobody, so three things keep number and names together:

    * `list` names as many executors as there are replicas. A replica that has no pod yet is a placeholder,
      "DEPLOYMENT-pending-0": what was asked for is not asked for twice.
    * Whoever is to go is marked before the number is reduced: with a deletion cost, which makes it the first that
      Kubernetes ends, and as scaled down, which keeps the number from being reduced for it twice.
    * Marked pods are not listed as long as Kubernetes has that many pods too many. One that is left over, because the
      reduction failed after the mark, or because Kubernetes ended another pod, is listed again, as retired. Then
      terminating it reduces the number once more, and the pod that went in its place is missing and launched again.

    A retired pod whose executor ends is started again by Kubernetes, unlike those of other actuators, and joins as
    retired. Termination is what ends it.
    """

    # Invariant: no reduction is without a mark. A failure in between leaves a mark without a reduction, and that is
    # seen by whoever comes next: there are more marks than pods too many.

    def __init__(
        self,
        deployments: Mapping[str, str],
        namespace: str = "default",
        *,
        timeout_s: float = _TIMEOUT_S,
        node_wait_s: float = _NODE_WAIT_S,
        configuration: Any = None,
    ) -> None:
        """Act on the Deployment that `deployments` has for each node type.

        For `node_wait_s` a pod may wait for a node before that is a failure: adding a node to a cluster takes minutes.
        Without a `configuration` of the Kubernetes client that of the pod this runs in is used, or the kubeconfig.
        Raises `ActuatorError` where the client is not installed or knows no cluster.
        """
        self._deployments = dict(deployments)
        self._node_wait_s = node_wait_s
        self._api = _open(namespace, timeout_s, configuration)
        self._changing = asyncio.Lock()  # held while replicas change: launches at once would only meet in conflicts

    async def list(self) -> Sequence[Launched]:
        """See `Actuator`."""
        lists = await asyncio.gather(
            *(asyncio.to_thread(self._list, node_type, name) for node_type, name in self._deployments.items())
        )
        return sorted((one for launched in lists for one in launched), key=lambda one: one.executor_id)

    async def launch(self, node_type: str) -> str:
        """See `Actuator`. The name is that of a pod that there will be, and unknown."""
        deployment = self._deployments.get(node_type)
        if deployment is None:
            known = ", ".join(sorted(self._deployments))
            raise ActuatorError(f"no Deployment for node type '{node_type}'; there are some for {known}")
        async with self._changing:
            await asyncio.to_thread(self._change_scale, deployment, 1)
        return ""

    async def retire(self, executor_id: str) -> None:
        """See `Actuator`."""
        await asyncio.to_thread(self._retire, executor_id)

    async def terminate(self, executor_id: str) -> None:
        """See `Actuator`."""
        async with self._changing:
            await asyncio.to_thread(self._terminate, executor_id)

    async def close(self) -> None:
        """See `Actuator`."""
        await asyncio.to_thread(self._api.close)

    def _list(self, node_type: str, name: str) -> Sequence[Launched]:
        deployment, pods = self._look(name)
        hidden = _going(deployment, pods)
        launched = [self._launched(node_type, pod) for pod in pods if pod.name not in hidden]
        return launched + [_placeholder(node_type, deployment, n) for n in range(deployment.replicas - len(pods))]

    def _launched(self, node_type: str, pod: Pod) -> Launched:
        waits_too_long = bool(pod.wait_for_node) and pod.age_s >= self._node_wait_s
        return Launched(
            executor_id=pod.name,
            node_type=node_type,
            age_s=pod.age_s,
            is_running=pod.is_running,
            is_retired=pod.is_retired,
            last_failure=pod.wait_for_node if waits_too_long else pod.failure,
        )

    def _look(self, name: str) -> tuple[Deployment, Sequence[Pod]]:
        deployment = self._api.read_deployment(name)
        return deployment, self._api.list_pods(deployment.selector)

    def _retire(self, executor_id: str) -> None:
        try:
            self._api.annotate_pod(executor_id, {DELETION_COST: FIRST_TO_GO})
        except GoneError:
            pass

    def _terminate(self, executor_id: str) -> None:
        placeholder = _PLACEHOLDER.fullmatch(executor_id)
        if placeholder and placeholder[1] in self._deployments.values():
            self._give_up(placeholder[1])
            return
        for name in self._deployments.values():
            deployment, pods = self._look(name)
            pod = next((pod for pod in pods if pod.name == executor_id), None)
            if pod is not None:
                if pod.name not in _going(deployment, pods) and self._mark(pod):
                    self._change_scale(name, -1)
                return

    def _give_up(self, name: str) -> None:
        """Do without a pod that there is not yet: one is as good as another. Without such a pod nothing is changed."""
        deployment, pods = self._look(name)
        if deployment.replicas > len(pods):
            self._change_scale(name, -1)

    def _mark(self, pod: Pod) -> bool:
        """Make a pod the one that goes when the number is reduced; returns False when it has gone already."""
        try:
            self._api.annotate_pod(pod.name, {DELETION_COST: FIRST_TO_GO, SCALED_DOWN: "true"})
        except GoneError:
            return False
        return True

    def _change_scale(self, deployment: str, by: int) -> None:
        """Change the replicas, whoever else does at the same time."""
        for attempt in range(1, _TRIES + 1):
            try:
                self._api.change_scale(deployment, by)
            except ConflictError as error:
                if attempt == _TRIES:
                    raise ActuatorError(f"{error} ({_TRIES} times in a row)") from error
                time.sleep(_FIRST_PAUSE_S * attempt)
            else:
                return


def _open(namespace: str, timeout_s: float, configuration: Any) -> KubernetesApi:
    try:
        from autoscaler_svc.actuators.kubernetes_api import KubernetesApi
    except ImportError as error:
        raise ActuatorError(
            f"the actuator kubernetes needs the client of Kubernetes ({error}); "
            f"pip install 'paceline-server[kubernetes]'"
        ) from error
    return KubernetesApi(namespace, timeout_s, configuration)


def _going(deployment: Deployment, pods: Sequence[Pod]) -> set[str]:
    """The marked pods that Kubernetes has yet to end: as many as there are pods too many, in the order of names.

    Example: 3 replicas, 4 pods, two of them marked. One goes; for the other the number was never reduced.
    """
    surplus = max(0, len(pods) - deployment.replicas)
    return {pod.name for pod in [pod for pod in pods if pod.is_scaled_down][:surplus]}


def _placeholder(node_type: str, deployment: Deployment, number: int) -> Launched:
    return Launched(
        executor_id=f"{deployment.name}-pending-{number}",
        node_type=node_type,
        age_s=seconds_since(deployment.scaled_at),
        is_running=False,
        last_failure=deployment.failure,
    )
