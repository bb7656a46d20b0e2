"""Everything that the scaling file may say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from autoscaler_svc.policies.concurrency import Concurrency
from autoscaler_svc.policies.schedule import Schedule
from autoscaler_svc.policies.slo import Slo
from autoscaler_svc.policies.threshold import Threshold
from autoscaler_svc.settings import Count, Positive, Seconds, Setting, Window

PolicySetting = Annotated[Threshold | Concurrency | Slo | Schedule, Field(discriminator="kind")]


class Bounds(Setting):
    """How many executors there may be, in those of capacity 1."""

    min: Count = 0
    max: Annotated[int, Field(ge=1, le=10_000)]
    max_cost_per_hour: Positive | None = None
    """By the prices of the node types. None: whatever it costs."""

    @model_validator(mode="after")
    def _check(self) -> Bounds:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}; min must be at most max")
        return self


class Targets(Setting):
    """What users should see; policy `slo` keeps it, and everybody is measured against it."""

    first_token_s: Annotated[Seconds, Field(gt=0, le=3600)] = 2.0
    per_token_s: Annotated[Seconds, Field(gt=0, le=10)] = 0.1


class Cooldowns(Setting):
    """How long to wait after one change before the next."""

    up_s: Window = 0.0
    """After an executor was added before another is."""
    down_s: Window = 60.0
    """After any change before executors are taken away."""
    zero_s: Window = 120.0
    """Without any request before the last one goes."""


class Times(Setting):
    """How long things may take."""

    interval_s: Annotated[Seconds, Field(ge=0.1, le=60)] = 1.0
    """Between two looks at the load."""
    startup_s: Seconds = 0.0
    """From a launch until the executor takes requests, until it has been measured. 0: unknown."""
    startup_limit_s: Annotated[Seconds, Field(ge=1)] = 600.0
    """After which an executor that is not ready is replaced."""
    finish_s: Seconds = 30.0
    """For which requests may finish on an executor that is drained before they move."""


_EMPTY_WHEN_RIGHT = ("waiting_requests", "waiting_tokens", "backlog_seconds")

LOCAL = "local"
"""Node type of child processes: the machine that everything runs on."""


class NodeType(Setting):
    """What an executor can run on."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    price_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Of one executor, in whatever money."""
    capacity: Annotated[float, Field(ge=0.05, le=1000)] = 1.0
    """What an executor on it does, in executors of the first type."""
    max: Annotated[int, Field(ge=0, le=10_000)] = 10_000


class Processes(Setting):
    """Child processes of `paceline serve`."""

    kind: Literal["processes"] = "processes"
    address: str = ""
    """Of the launcher, `unix:/path`; `paceline serve` says it on the command line."""


class Kubernetes(Setting):
    """Deployments, one for each node type."""

    kind: Literal["kubernetes"]
    namespace: str = "default"
    deployments: Annotated[dict[str, str], Field(min_length=1)]
    """Deployment of each node type."""

    @model_validator(mode="after")
    def _check(self) -> Kubernetes:
        if len(set(self.deployments.values())) < len(self.deployments):
            raise ValueError("two node types have the same Deployment; give each its own")
        return self


class Ray(Setting):
    """Ray actors, each with an executor."""

    kind: Literal["ray"]
    address: str = "auto"
    pool: Annotated[str, Field(pattern="[a-z0-9-]{1,40}")] = "default"
    """Executors of one scheduler: those of others in the same cluster have another."""
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """What an actor starts; `{executor_id}` and `{node_ip}` stand for its own."""
    resources: dict[str, dict[str, float]] = Field(default_factory=dict)
    """What an executor needs, by node type: `num_cpus`, `num_gpus` and custom ones."""


class Keda(Setting):
    """Nobody: KEDA asks at `keda.listen` how many there should be."""

    kind: Literal["keda"]


class KedaService(Setting):
    """Where KEDA asks."""

    listen: str = "127.0.0.1:50071"


class ScalingSettings(Setting):
    """The scaling file."""

    executors: Bounds
    targets: Targets = Targets()
    policies: Annotated[tuple[PolicySetting, ...], Field(min_length=1)] = (Slo(),)
    cooldowns: Cooldowns = Cooldowns()
    times: Times = Times()
    node_types: tuple[NodeType, ...] = ()
    actuator: Annotated[Processes | Kubernetes | Ray | Keda, Field(discriminator="kind")] = Processes()
    keda: KedaService | None = None
    history: str = ""
    """File that keeps what arrived over a restart, for forecasts by day and week. Empty: none."""

    @model_validator(mode="after")
    def _check(self) -> ScalingSettings:
        for check in (_check_names, _check_counts, _check_keda):
            check(self)
        return self

    @property
    def kinds_of_nodes(self) -> tuple[NodeType, ...]:
        """The node types that there are; one where the file names none."""
        if self.node_types:
            return self.node_types
        if isinstance(self.actuator, Kubernetes):
            return tuple(NodeType(name=name) for name in self.actuator.deployments)
        if isinstance(self.actuator, Ray) and self.actuator.resources:
            return tuple(NodeType(name=name) for name in self.actuator.resources)
        return (NodeType(name=LOCAL),)

    @property
    def advice(self) -> list[str]:
        """What is allowed and seldom meant, for people."""
        empty = [
            policy.signal
            for policy in self.policies
            if isinstance(policy, Threshold)
            and policy.signal in ("waiting_requests", "waiting_tokens", "backlog_seconds")
        ]
        if len(empty) < len(self.policies):
            return []
        return [
            f"{empty[0]} is empty as soon as there are enough executors: alone it takes them away again; add a policy"
        ]


def _check_names(settings: ScalingSettings) -> None:
    """Node types are the actuator's. Raises `ValueError`."""
    names, actuator = [node_type.name for node_type in settings.node_types], settings.actuator
    if len(set(names)) < len(names):
        raise ValueError(f"node_types has a name twice: {', '.join(names)}")
    others = [name for name in names if name != LOCAL]
    if isinstance(actuator, Processes) and others:
        raise ValueError(
            f"node_types names '{others[0]}', and the actuator is processes, all of which run on this machine; name "
            f"one, {LOCAL}, or another actuator"
        )
    known: dict[str, Any] = {}
    if isinstance(actuator, Kubernetes):
        field_name, known = "deployments", dict(actuator.deployments)
    elif isinstance(actuator, Ray):
        field_name, known = "resources", dict(actuator.resources)
    if known and names and set(names) != known.keys():
        raise ValueError(
            f"actuator.{field_name} names {', '.join(sorted(known))} and node_types {', '.join(sorted(names))}; name "
            f"the same in both"
        )


def _check_counts(settings: ScalingSettings) -> None:
    """What has to be there can be, and can be paid. Raises `ValueError`."""
    bounds, node_types = settings.executors, settings.kinds_of_nodes
    possible = sum(node_type.max * node_type.capacity for node_type in node_types)
    if bounds.min > possible:
        raise ValueError(
            f"executors.min is {bounds.min}, and all node types together have at most {possible:g}; raise their max"
        )
    if bounds.max_cost_per_hour is None:
        return
    if not any(node_type.price_per_hour for node_type in node_types):
        raise ValueError("executors.max_cost_per_hour is set and no node type has a price; add price_per_hour")
    affordable = affordable_count(bounds, node_types)
    if bounds.min > affordable:
        raise ValueError(
            f"executors.min is {bounds.min}, and max_cost_per_hour, {bounds.max_cost_per_hour:g}, is enough for "
            f"{affordable:g}; lower the one or raise the other"
        )


def _check_keda(settings: ScalingSettings) -> None:
    """Somebody who asks has to have an address. Raises `ValueError`."""
    if isinstance(settings.actuator, Keda) and settings.keda is None:
        raise ValueError("the actuator is keda and nothing says where KEDA asks; add keda: {listen: 0.0.0.0:50071}")


def affordable_count(bounds: Bounds, node_types: Sequence[NodeType]) -> float:
    """Executors, in those of capacity 1, that the money is enough for: the cheapest for what they do first."""
    if bounds.max_cost_per_hour is None:
        return math.inf
    left, capacity = bounds.max_cost_per_hour, 0.0
    for node_type in sorted(node_types, key=lambda node_type: node_type.price_per_hour / node_type.capacity):
        if not node_type.price_per_hour:
            capacity += node_type.max * node_type.capacity
            continue
        several = min(node_type.max, math.floor(left / node_type.price_per_hour + 1e-9))
        capacity, left = capacity + several * node_type.capacity, left - several * node_type.price_per_hour
    return math.floor(capacity + 1e-9)
