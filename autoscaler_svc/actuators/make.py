"""The actuator that the scaling file names."""

from __future__ import annotations

from autoscaler_svc.actuators.actuator import Actuator, ActuatorError
from autoscaler_svc.actuators.kubernetes import KubernetesActuator
from autoscaler_svc.actuators.processes import ProcessActuator
from autoscaler_svc.actuators.ray import RayActuator
from autoscaler_svc.scaling_settings import Keda, Kubernetes, Processes, Ray, ScalingSettings


def make_actuator(settings: ScalingSettings) -> Actuator | None:
    """Who acts; None where KEDA does. Libraries that only one of them needs are imported with it.

    Raises `ActuatorError` where such a library is not installed, or the file does not say enough.
    """
    match settings.actuator:
        case Processes(address=""):
            raise ActuatorError(
                "the actuator is processes, which only `paceline serve` has; give it this file with --scaling, or name "
                "another one in the file: kubernetes, ray or keda"
            )
        case Processes(address=address):
            return ProcessActuator(address)
        case Kubernetes(namespace=namespace, deployments=deployments):
            return KubernetesActuator(deployments, namespace)
        case Ray(address=address, pool=pool, command=command, resources=resources):
            limits = {node_type.name: node_type.max for node_type in settings.node_types}
            return RayActuator(command, resources, address=address, pool=pool, max_counts=limits)
        case Keda():
            return None
