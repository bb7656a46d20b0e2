"""What an actuator is: the hands of the autoscaler, which owns no process itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Launched:
    """An executor that an actuator has launched and that has not ended."""

    executor_id: str  # under which it joins the scheduler
    node_type: str
    age_s: float  # since it was launched, restarts of its process included
    is_running: bool = True  # its process, pod or actor runs, whether its model is loaded or not
    is_retired: bool = False  # when it ends it is not started again
    last_failure: str = ""  # how it ended or why it does not start, for people; "": nothing is wrong


class ActuatorError(Exception):
    """The actuator could not do what it was asked for; the message names what and why. Asking again later may help."""


class NoRoomError(ActuatorError):
    """There is no place for one more executor: the message has the limit."""


class Actuator(Protocol):
    """Starts and ends executors. Every call is level-triggered: repeating it changes nothing, and nothing is remembered
    here that `list` does not show, so that an autoscaler that was restarted goes on.

    All calls raise `ActuatorError`. Whether an executor is ready only the scheduler knows: it has joined then.
    """

    async def list(self) -> Sequence[Launched]:
        """What was launched and has not ended, in the order of the names."""
        ...

    async def launch(self, node_type: str) -> str:
        """Start one executor on a node of that type; returns the name under which it will join, or "" where that is not
        known yet. Returns long before it is ready. Raises `NoRoomError` where there is no place for it.
        """
        ...

    async def retire(self, executor_id: str) -> None:
        """The executor is about to be drained: whatever restarts it is to leave it when it ends."""
        ...

    async def terminate(self, executor_id: str) -> None:
        """End the executor: whatever is left on it goes on elsewhere. One that is gone is no error."""
        ...

    async def close(self) -> None:
        """Let go of connections. What was launched goes on."""
        ...
