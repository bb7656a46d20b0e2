"""What of Deployments and pods matters to an actuator, read off what the client of Kubernetes returns."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from autoscaler_svc.actuators.actuator import ActuatorError

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Annotation: a ReplicaSet with too many pods ends those first for which this number is lowest."""

FIRST_TO_GO = "-1000"
SCALED_DOWN = "paceline.dev/scaled-down"
"""Annotation: the Deployment's replicas are reduced for this pod, or are just about to be."""

_HARMLESS_WAITS = ("", "ContainerCreating", "PodInitializing")


class ConflictError(ActuatorError):
    """Somebody has changed the object since it was read."""


class GoneError(ActuatorError):
    """There is no such object."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What an actuator wants to know of a Deployment."""

    name: str
    replicas: int  # pods that there should be
    selector: str  # of its pods
    scaled_at: datetime | None  # when somebody set `replicas` last; None: unknown
    failure: str  # why pods are not created, such as a quota; "": nothing is wrong


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that its ReplicaSet counts: it has neither ended nor been told to."""

    name: str
    age_s: float
    is_running: bool  # all its containers run
    is_retired: bool  # it is among the first to go
    is_scaled_down: bool  # see `SCALED_DOWN`
    failure: str  # how its process ended, or why it does not start
    wait_for_node: str  # why the scheduler of Kubernetes finds no node for it; "": it has one


def counts(pod: Any) -> bool:
    """Whether a ReplicaSet takes a pod for one of its replicas."""
    phase = pod.status.phase if pod.status else None
    return pod.metadata.deletion_timestamp is None and phase not in ("Succeeded", "Failed")


def read_pod(pod: Any) -> Pod:
    annotations = pod.metadata.annotations or {}
    phase = pod.status.phase if pod.status else None
    containers = (pod.status.container_statuses if pod.status else None) or []
    runs = bool(containers) and all(one.state is not None and one.state.running is not None for one in containers)
    return Pod(
        name=pod.metadata.name,
        age_s=seconds_since(pod.metadata.creation_timestamp),
        is_running=phase == "Running" and runs,
        is_retired=annotations.get(DELETION_COST) == FIRST_TO_GO,
        is_scaled_down=annotations.get(SCALED_DOWN) == "true",
        failure=next(filter(None, map(_container_failure, containers)), ""),
        wait_for_node=_unschedulable(pod.status),
    )


def _container_failure(container: Any) -> str:
    """Why a container does not run, and how it ended the last time.

    Example: "CrashLoopBackOff; ended with exit code 1 (Error)".
    """
    parts = []
    waiting = container.state.waiting if container.state else None
    if waiting is not None and (waiting.reason or "") not in _HARMLESS_WAITS:
        parts.append(f"{waiting.reason}: {waiting.message}" if waiting.message else waiting.reason)
    for state in (container.state, container.last_state):
        if state is not None and state.terminated is not None:
            reason = f" ({state.terminated.reason})" if state.terminated.reason else ""
            parts.append(f"ended with exit code {state.terminated.exit_code}{reason}")
            break
    return "; ".join(parts)


def _unschedulable(status: Any) -> str:
    for condition in (status.conditions if status else None) or []:
        if condition.type == "PodScheduled" and condition.status == "False" and condition.reason == "Unschedulable":
            return f"Unschedulable: {condition.message or 'no node fits'}"
    return ""


def replica_failure(status: Any) -> str:
    for condition in (status.conditions if status else None) or []:
        if condition.type == "ReplicaFailure" and condition.status == "True":
            return f"{condition.reason or 'ReplicaFailure'}: {condition.message or 'pods cannot be created'}"
    return ""


def scaled_at(metadata: Any) -> datetime | None:
    """When the scale was written last, as the API server notes for everybody who writes it."""
    written = [field.time for field in metadata.managed_fields or [] if field.subresource == "scale" and field.time]
    return max(written, default=None)


def seconds_since(moment: datetime | None) -> float:
    """How long ago that was; 0 where it is unknown or, by another clock, to come."""
    if moment is None:
        return 0.0
    return max(0.0, (datetime.now(UTC) - moment).total_seconds())
