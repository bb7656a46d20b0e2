"""What an actuator asks of Kubernetes: blocking calls, each with a time-out, whose answers are small values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException, OpenApiException
from kubernetes.config.config_exception import ConfigException

from autoscaler_svc.actuators.actuator import ActuatorError, NoRoomError
from autoscaler_svc.actuators.kubernetes_objects import (
    ConflictError,
    Deployment,
    GoneError,
    Pod,
    counts,
    read_pod,
    replica_failure,
    scaled_at,
)

_FORBIDDEN, _NOT_FOUND, _CONFLICT = 403, 404, 409


class KubernetesApi:
    """The calls, in one namespace. Every one raises `ActuatorError`, with verb, object, status and reason."""

    def __init__(self, namespace: str, timeout_s: float, configuration: Any = None) -> None:
        """Without a `configuration` the service account of this pod is used, or else the kubeconfig of the user."""
        self._namespace = namespace
        self._timeout_s = timeout_s
        configuration = configuration or _load_configuration()
        configuration.retries = False  # the time-out is for all of a call, and the autoscaler asks again anyway
        self._client = client.ApiClient(configuration)
        self._apps, self._core = client.AppsV1Api(self._client), client.CoreV1Api(self._client)

    def read_deployment(self, name: str) -> Deployment:
        """How a Deployment stands."""
        found = self._call("get", f"deployment/{name}", self._apps.read_namespaced_deployment, name)
        labels = (found.spec.selector.match_labels if found.spec and found.spec.selector else None) or {}
        if not labels:
            raise ActuatorError(f"{self._place(f'deployment/{name}')} selects its pods by no matchLabels; give it some")
        return Deployment(
            name=name,
            replicas=found.spec.replicas if found.spec.replicas is not None else 1,
            selector=",".join(f"{key}={value}" for key, value in sorted(labels.items())),
            scaled_at=scaled_at(found.metadata),
            failure=replica_failure(found.status),
        )

    def list_pods(self, selector: str) -> list[Pod]:
        """The pods that count as replicas, in the order of their names."""
        found = self._call("list", f"pods with {selector}", self._core.list_namespaced_pod, label_selector=selector)
        pods = [read_pod(pod) for pod in found.items if counts(pod)]
        return sorted(pods, key=lambda pod: pod.name)

    def annotate_pod(self, name: str, annotations: dict[str, str]) -> None:
        """Set annotations of a pod. Raises `GoneError`."""
        patch = {"metadata": {"annotations": annotations}}
        self._call("patch", f"pod/{name}", self._core.patch_namespaced_pod, name, body=patch)

    def change_scale(self, deployment: str, by: int) -> bool:
        """Have `by` more pods, or fewer, but never less than none; returns whether that is a change.

        Raises `ConflictError` when somebody else was faster: the number must be read again.
        """
        what = f"deployment/{deployment}/scale"
        scale = self._call("get", what, self._apps.read_namespaced_deployment_scale, deployment)
        replicas = (scale.spec.replicas if scale.spec else None) or 0
        wanted = max(0, replicas + by)
        if wanted == replicas:
            return False
        metadata = client.V1ObjectMeta(
            name=deployment, namespace=self._namespace, resource_version=scale.metadata.resource_version
        )
        body = client.V1Scale(metadata=metadata, spec=client.V1ScaleSpec(replicas=wanted))
        self._call("replace", what, self._apps.replace_namespaced_deployment_scale, deployment, body=body)
        return True

    def close(self) -> None:
        """Let go of connections."""
        self._client.rest_client.pool_manager.clear()

    def _call(self, verb: str, what: str, method: Callable[..., Any], *names: str, **rest: Any) -> Any:
        with self._errors(verb, what):
            return method(*names, namespace=self._namespace, _request_timeout=self._timeout_s, **rest)

    @contextmanager
    def _errors(self, verb: str, what: str) -> Iterator[None]:
        """Turn everything that the client raises into an `ActuatorError`."""
        try:
            yield
        except ApiException as error:
            raise _error(f"Kubernetes refuses to {verb} {self._place(what)}", error) from error
        except urllib3.exceptions.HTTPError as error:
            asked = f"'{verb}' of {self._place(what)}"
            is_late = isinstance(error, urllib3.exceptions.TimeoutError)
            if is_late and not isinstance(error, urllib3.exceptions.NewConnectionError):  # which is one of those too
                raise ActuatorError(f"Kubernetes has not answered {asked} within {self._timeout_s:g} s") from error
            raise ActuatorError(f"Kubernetes does not answer {asked}: {error}") from error
        except (OpenApiException, ValueError, OSError) as error:  # an answer that is none, a token that cannot be read
            raise ActuatorError(f"cannot {verb} {self._place(what)}: {error}") from error

    def _place(self, what: str) -> str:
        return f"{what} in namespace '{self._namespace}'"


def _load_configuration() -> Any:
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except ConfigException:
        try:
            config.load_kube_config(client_configuration=configuration)
        except (ConfigException, OSError) as error:
            raise ActuatorError(
                f"no Kubernetes to act on: this process is not in a pod with a service account, and {error}; "
                f"set KUBECONFIG"
            ) from error
    return configuration


def _error(what: str, error: ApiException) -> ActuatorError:
    """The error for a status, with the words of the server."""
    message = f"{what}: {error.status} {error.reason}"
    try:
        said = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        said = ""
    if said:
        message += f": {said}"
    if error.status == _FORBIDDEN and "exceeded quota" in said:
        return NoRoomError(message)
    if error.status == _NOT_FOUND:
        return GoneError(message)
    if error.status == _CONFLICT:
        return ConflictError(message)
    return ActuatorError(message)
