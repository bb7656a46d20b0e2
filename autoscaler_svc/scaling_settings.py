"""Everything that the scaling file may say."""

from __future__ import annotations

from typing import Annotated, Literal

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
    capacity: Positive = 1.0
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
        names = [node_type.name for node_type in self.node_types]
        if len(set(names)) < len(names):
            raise ValueError(f"node_types has a name twice: {', '.join(names)}")
        if isinstance(self.actuator, Processes) and names not in ([], [LOCAL]):
            raise ValueError(
                f"node_types names '{next(name for name in names if name != LOCAL)}', and the actuator is processes, "
                f"all of which run on this machine; name one, {LOCAL}, or another actuator"
            )
        least = self.executors.min * min((node_type.price_per_hour for node_type in self.node_types), default=0.0)
        most = self.executors.max_cost_per_hour
        if most is not None and least > most:
            raise ValueError(
                f"executors.min is {self.executors.min}, which costs {least:g} an hour at least, and max_cost_per_hour "
                f"is {most:g}; lower the one or raise the other"
            )
        if isinstance(self.actuator, Kubernetes) and names and set(names) != set(self.actuator.deployments):
            raise ValueError(
                f"actuator.deployments names {', '.join(sorted(self.actuator.deployments))} and node_types "
                f"{', '.join(sorted(names))}; name the same in both"
            )
        if isinstance(self.actuator, Keda) and self.keda is None:
            raise ValueError("the actuator is keda and nothing says where KEDA asks; add keda: {listen: 0.0.0.0:50071}")
        return self

    @property
    def kinds_of_nodes(self) -> tuple[NodeType, ...]:
        """The node types that there are; one where the file names none."""
        if self.node_types:
            return self.node_types
        if isinstance(self.actuator, Kubernetes):
            return tuple(NodeType(name=name) for name in self.actuator.deployments)
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
