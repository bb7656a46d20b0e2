"""Executors as actors of a Ray cluster: each keeps one executor running as a child process on its node."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from autoscaler_svc.actuators.actuator import ActuatorError, Launched, NoRoomError

if TYPE_CHECKING:
    from autoscaler_svc.actuators.ray_cluster import RayCluster

_TIMEOUT_S = 12.0
_STATUS_TIMEOUT_S = 0.5
_NODE_WAIT_S = 300.0
_STOP_GRACE_S = 8.0
_KILL_S = 2.0
_FIRST_PAUSE_S = 1.0
_THREADS = 8

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ActorName:
    """What the name of an actor says, so that nobody has to remember it.

    Example: "demo-3fa9c1@1767225600000@a100" is executor demo-3fa9c1, launched at that Unix time on a node type a100.
    """

    executor_id: str
    launched_at_ms: int
    node_type: str

    def __str__(self) -> str:
        return f"{self.executor_id}@{self.launched_at_ms}@{self.node_type}"

    @classmethod
    def parse(cls, name: str) -> ActorName | None:
        """None for an actor that somebody else has given a name."""
        executor_id, _, rest = name.partition("@")
        launched_at_ms, separator, node_type = rest.partition("@")
        if not separator or not launched_at_ms.isdecimal():
            return None
        return cls(executor_id, int(launched_at_ms), node_type)


class RayActuator:
    """An `Actuator` by detached actors, in a namespace for each pool of executors.

    Where there is no node for an actor it waits, and Ray's own autoscaler, if there is one, adds a node. An actor goes
    with its node and is not moved: the executor is missing then, and another is launched.
    """

    def __init__(
        self,
        command: Sequence[str],
        needs: Mapping[str, Mapping[str, float]] | None = None,
        *,
        address: str = "auto",
        pool: str = "default",
        max_counts: Mapping[str, int] | None = None,
        timeout_s: float = _TIMEOUT_S,
        status_timeout_s: float = _STATUS_TIMEOUT_S,
        node_wait_s: float = _NODE_WAIT_S,
        stop_grace_s: float = _STOP_GRACE_S,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        """Have actors run `command`, in which `{executor_id}` and `{node_ip}` stand for an executor's own.

        `needs` has for each node type what an executor takes there: `num_cpus`, `num_gpus`, `memory` and custom
        resources; empty, every node will do. `max_counts` has how many there may be of a type.
        For `node_wait_s` an actor may wait for a node before that is a failure: adding a node takes minutes.
        A terminated executor has `stop_grace_s` to end by itself; one that has ended by mistake is started again after
        `first_pause_s`, then twice that, and so on. Raises `ActuatorError` where Ray is not installed.
        """
        self._command = tuple(command)
        self._needs = dict(needs or {})
        self._pool = pool
        self._max_counts = dict(max_counts or {})
        self._timeout_s, self._status_timeout_s = timeout_s, status_timeout_s
        self._node_wait_s, self._stop_grace_s, self._first_pause_s = node_wait_s, stop_grace_s, first_pause_s
        self._address = address
        self._cluster = _open(address, f"paceline-{pool}")
        self._launching = asyncio.Lock()  # held from counting to starting, so that there is never one too many
        # Not the threads that everybody shares: calls to a cluster that hangs would take all of them.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ray-actuator")

    async def list(self) -> Sequence[Launched]:
        """See `Actuator`."""
        return await self._in_thread("list", self._list)

    async def launch(self, node_type: str) -> str:
        """See `Actuator`."""
        if self._needs and node_type not in self._needs:
            raise ActuatorError(f"no node type '{node_type}'; there are {', '.join(sorted(self._needs))}")
        async with self._launching:
            return await self._in_thread("launch", self._launch, node_type)

    async def retire(self, executor_id: str) -> None:
        """See `Actuator`."""
        await self._in_thread("retire", self._retire, executor_id)

    async def terminate(self, executor_id: str) -> None:
        """See `Actuator`."""
        await self._in_thread("terminate", self._terminate, executor_id)

    async def close(self) -> None:
        """See `Actuator`."""
        with contextlib.suppress(ActuatorError):  # a cluster that hangs keeps nobody from going
            await self._in_thread("close", self._cluster.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, what: str, function: Callable[..., _Result], *arguments: Any) -> _Result:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except TimeoutError as error:
            message = f"Ray at '{self._address}' has not answered '{what}' within {self._timeout_s:g} s"
            raise ActuatorError(message) from error

    def _names(self) -> Sequence[ActorName]:
        parsed = map(ActorName.parse, self._cluster.names())
        return sorted((name for name in parsed if name is not None), key=lambda name: name.executor_id)

    def _named(self, executor_id: str) -> str | None:
        """The actor of an executor, if there is one."""
        return next((str(name) for name in self._names() if name.executor_id == executor_id), None)

    def _list(self) -> Sequence[Launched]:
        names = self._names()
        statuses = self._cluster.statuses([str(name) for name in names], self._status_timeout_s)
        now_ms = time.time() * 1000
        return [self._launched(name, now_ms, statuses[str(name)]) for name in names if str(name) in statuses]

    def _launched(self, name: ActorName, now_ms: float, status: Mapping[str, Any] | None) -> Launched:
        age_s = max(0.0, (now_ms - name.launched_at_ms) / 1000)
        if status is None:
            needs = ", ".join(f"{key} {value:g}" for key, value in self._needs.get(name.node_type, {}).items())
            failure = f"waits for a node with {needs or 'room'}, or its node does not answer"
            is_late = age_s >= self._node_wait_s
            return Launched(
                name.executor_id, name.node_type, age_s, is_running=False, last_failure=failure if is_late else ""
            )
        return Launched(
            executor_id=name.executor_id,
            node_type=name.node_type,
            age_s=age_s,
            is_running=status["is_running"],
            is_retired=status["is_retired"],
            last_failure=status["last_failure"],
        )

    def _launch(self, node_type: str) -> str:
        limit = self._max_counts.get(node_type)
        count = sum(name.node_type == node_type for name in self._names())
        if limit is not None and count >= limit:
            raise NoRoomError(f"there are {count} executors of node type '{node_type}', as many as there may be")
        name = ActorName(f"{self._pool}-{secrets.token_hex(3)}", int(time.time() * 1000), node_type)
        needs = self._needs.get(node_type, {})
        self._cluster.start(str(name), needs, name.executor_id, self._command, self._first_pause_s)
        return name.executor_id

    def _retire(self, executor_id: str) -> None:
        name = self._named(executor_id)
        if name is not None and not self._cluster.call(name, "retire", timeout_s=self._timeout_s / 2):
            raise ActuatorError(f"the actor of executor '{executor_id}' does not answer; it waits for a node, or hangs")

    def _terminate(self, executor_id: str) -> None:
        name = self._named(executor_id)
        if name is None:
            return
        # One that does not answer has no executor yet, or hangs and takes its executor along.
        if self._cluster.statuses([name], self._status_timeout_s).get(name) is not None:
            self._cluster.call(name, "stop", self._stop_grace_s, timeout_s=self._stop_grace_s + _KILL_S)
        self._cluster.kill(name)


def _open(address: str, namespace: str) -> RayCluster:
    try:
        from autoscaler_svc.actuators.ray_cluster import RayCluster
    except ImportError as error:
        raise ActuatorError(f"the actuator ray needs Ray ({error}); pip install 'paceline-server[ray]'") from error
    return RayCluster(address, namespace)
