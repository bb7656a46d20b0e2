"""What an actuator asks of Ray: blocking calls for named actors of one namespace."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Read when Ray is imported. Its handler of SIGTERM would print a stack and end a process that has to leave in order.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")

import ray
import structlog
from ray.exceptions import ActorDiedError, RayError

from autoscaler_svc.actuators import ray_host
from autoscaler_svc.actuators.actuator import ActuatorError
from autoscaler_svc.actuators.ray_host import ExecutorHost

log = structlog.get_logger()

_OPTIONS = ("num_cpus", "num_gpus", "memory")
"""What Ray takes by these names; everything else are custom resources."""

_CALLS_AT_ONCE = 8
_REACH_S, _CLOSE_S = 3.0, 1.0


class RayCluster:
    """The calls. Every one raises `ActuatorError`, and connects first; any number of threads may call.

    A Ray cluster that is lost for longer than a minute ends the processes that are connected to it, and so this one.
    """

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address
        self._namespace = namespace
        self._connecting = threading.Lock()
        self._is_mine = False  # the connection was made here, and not by whoever uses Ray in this process too
        self._asking = threading.Lock()  # for the two below
        self._actors: dict[str, Any] = {}  # handles by name, of those that were there at the last look
        self._asked: dict[str, Any] = {}  # the one call for its status that an actor has not answered, by its name

    def names(self) -> list[str]:
        """The actors that there are, whether they run or wait for a node."""
        with self._errors("list the actors"):
            found = ray.util.list_named_actors(all_namespaces=True)
        names = sorted(actor["name"] for actor in found if actor["namespace"] == self._namespace)
        with self._asking:
            for known in (self._actors, self._asked):
                for name in known.keys() - set(names):
                    del known[name]
        return names

    def start(
        self, name: str, needs: Mapping[str, float], executor_id: str, command: Sequence[str], first_pause_s: float
    ) -> None:
        """Start an actor with an executor, where there is what it `needs`: now or as soon as there is."""
        options: dict[str, Any] = {key: value for key, value in needs.items() if key in _OPTIONS}
        options["resources"] = {key: value for key, value in needs.items() if key not in _OPTIONS}
        with self._errors("start an actor"):
            # By value: nodes need what the command names, and nothing of the release that this process runs.
            ray.cloudpickle.register_pickle_by_value(ray_host)
            host = ray.remote(ExecutorHost).options(
                name=name,
                namespace=self._namespace,
                lifetime="detached",
                max_restarts=0,  # elsewhere it would be another executor with the name of the first
                max_concurrency=_CALLS_AT_ONCE,  # one that stops goes on to answer
                **options,
            )
            host.remote(executor_id, tuple(command), first_pause_s)

    def statuses(self, names: Sequence[str], timeout_s: float) -> dict[str, dict[str, Any] | None]:
        """What `ExecutorHost.status` says of each, None without an answer in time; who is gone is not in it.

        An actor that has not answered is not asked again until it has: calls would pile up for the day it starts.
        """
        with self._errors("ask the actors"), self._asking:
            old = [self._asked[name] for name in names if name in self._asked]
            new = [call for name in names if name not in self._asked and (call := self._ask(name)) is not None]
            done = set(_done(new, timeout_s) + _done(old, 0))
            return dict(self._answers(names, done))

    def call(self, name: str, method: str, *arguments: Any, timeout_s: float) -> bool:
        """Call a method of an actor; returns whether it is done in time, or there is nobody to do it."""
        with self._errors(f"{method} an actor"):
            try:
                call = getattr(self._actor(name), method).remote(*arguments)
                done, _ = ray.wait([call], timeout=timeout_s)
                if done:
                    ray.get(done)
            except (ActorDiedError, LookupError):
                return True
        return bool(done)

    def kill(self, name: str) -> None:
        """End an actor, whether it runs or waits for a node."""
        with self._errors("kill an actor"), contextlib.suppress(ActorDiedError, LookupError):
            ray.kill(self._actor(name), no_restart=True)

    def close(self) -> None:
        """Let go of the connection; the actors go on."""
        if not self._connecting.acquire(timeout=_CLOSE_S):
            return  # there is none yet, and perhaps never will be
        try:
            if self._is_mine:
                ray.shutdown()
            self._is_mine = False
        finally:
            self._connecting.release()

    def _connect(self) -> None:
        with self._connecting:
            if ray.is_initialized():
                return
            _check_reachable(self._address)
            ray.init(address=self._address, namespace=self._namespace, log_to_driver=False, logging_level="ERROR")
            self._is_mine = True

    def _actor(self, name: str) -> Any:
        """Raises `LookupError` when there is no such actor."""
        actor = self._actors.get(name)
        if actor is None:
            try:
                actor = self._actors[name] = ray.get_actor(name, self._namespace)
            except ValueError as error:
                raise LookupError(name) from error
        return actor

    def _ask(self, name: str) -> Any:
        try:
            self._asked[name] = self._actor(name).status.remote()
        except LookupError:
            return None
        return self._asked[name]

    def _answers(self, names: Sequence[str], done: set[Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
        for name in names:
            call = self._asked.get(name)
            if call is None:
                continue  # it was gone before it could be asked
            if call not in done:
                yield name, None
                continue
            del self._asked[name]
            try:
                yield name, dict(ray.get(call))
            except ActorDiedError as error:
                log.warning("the actor of an executor has died", actor=name, reason=str(error))
            except RayError:  # it cannot be reached at the moment
                yield name, None

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Connect; turn everything that Ray raises into an `ActuatorError`."""
        try:
            self._connect()
        except Exception as error:
            raise ActuatorError(f"cannot connect to Ray at '{self._address}': {error}") from error
        try:
            yield
        except (RayError, RuntimeError, ValueError, TypeError, OSError) as error:
            raise ActuatorError(f"Ray at '{self._address}' cannot {what}: {error}") from error


def _check_reachable(address: str) -> None:
    """Raises `OSError` where nobody listens; Ray itself would try for minutes, and take its thread with it."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()


def _done(calls: Sequence[Any], timeout_s: float) -> list[Any]:
    """Those of the calls that are over within that time."""
    return list(ray.wait(calls, num_returns=len(calls), timeout=timeout_s)[0]) if calls else []
