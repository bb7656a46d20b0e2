"""Reads the scaling file: a wrong one is refused with the line and the reason."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from autoscaler_svc.scaling_settings import Processes, ScalingSettings
from autoscaler_svc.settings import Setting

_KINDS = ("threshold", "concurrency", "slo", "schedule", "processes", "kubernetes", "ray", "keda")


class ScalingFileError(ValueError):
    """A scaling file that cannot be used; the message has its name, the line, the reason and what is allowed."""


def read_scaling_file(path: Path) -> ScalingSettings:
    """Read and check the file. Raises `ScalingFileError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScalingFileError(f"cannot read {path}: {error}; name a YAML file") from error
    return parse_scaling(text, str(path))


def parse_scaling(text: str, name: str) -> ScalingSettings:
    """Check the text of a file of that name. Raises `ScalingFileError`.

    `targets` stand once in the file: what it does not say of policy `slo` itself is taken from there.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise ScalingFileError(f"{name}{f':{mark.line + 1}' if mark else ''}: no YAML: {problem}") from error
    if not isinstance(content, dict):
        raise ScalingFileError(f"{name}:1: must be a mapping that has at least executors: {{max: 4}}")
    if (twice := _repeated_key(root)) is not None:
        raise ScalingFileError(f"{name}:{twice.start_mark.line + 1}: '{twice.value}' stands there twice")
    try:
        return ScalingSettings.model_validate(_with_targets(content))
    except ValidationError as error:
        raise ScalingFileError(_lines(name, root, error)) from error


def for_processes(settings: ScalingSettings, name: str, launcher: str = "") -> ScalingSettings:
    """The settings for child processes of `paceline serve`, whose launcher is at that address.

    Raises `ScalingFileError` where they are for something else.
    """
    if not isinstance(settings.actuator, Processes):
        raise ScalingFileError(
            f"{name}: actuator is {settings.actuator.kind}, and `paceline serve` starts its executors itself; take "
            f"actuator out, or start `paceline scheduler` and `paceline autoscaler run` without it"
        )
    return settings.model_copy(update={"actuator": Processes(address=launcher)})


def _with_targets(content: dict[str, Any]) -> dict[str, Any]:
    """The content, with the targets in each policy `slo`."""
    targets = content.get("targets")
    policies = content.get("policies", [{"kind": "slo"}])
    if not isinstance(targets, dict) or not isinstance(policies, list):
        return content
    shared = {key: value for key, value in targets.items() if key in ("first_token", "per_token")}
    filled = [
        {**shared, **policy} if isinstance(policy, dict) and policy.get("kind") == "slo" else policy
        for policy in policies
    ]
    return {**content, "policies": filled}


def _lines(name: str, root: yaml.Node | None, error: ValidationError) -> str:
    """The findings, each with its line. A list whose entries are all wrong is not too short besides."""
    findings = error.errors()
    places = [finding["loc"] for finding in findings]
    return "\n".join(
        _line(name, root, finding)
        for finding in findings
        if finding["type"] != "too_short" or not any(p[:-1][: len(finding["loc"])] == finding["loc"] for p in places)
    )


def _line(name: str, root: yaml.Node | None, finding: Any) -> str:
    """One finding with the line that it is about."""
    assert root is not None
    node, place = root, []
    for part in finding["loc"]:
        below = _below(node, part)
        if below is None and part in _KINDS:
            continue  # says of which kind a policy or an actuator is, and is no key of the file
        place.append(str(part))
        node = node if below is None else below
    reason = _reason(finding, place)
    where = ".".join(place)
    return f"{name}:{node.start_mark.line + 1}: {f'{where}: ' if where else ''}{reason}"


def _reason(finding: Any, place: list[str]) -> str:
    """What is wrong, in words for somebody who has never heard of the library that found it.

    Shortens `place` where what is missing is no place.
    """
    kind, given = finding["type"], finding.get("input")
    if kind == "extra_forbidden":
        return f"there is no such setting{_meant(place[-1])}"
    if kind == "missing":
        return f"'{place.pop()}' is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        said = given.get("kind") if isinstance(given, dict) else given
        return f"kind must be one of {finding['ctx'].get('expected_tags', '')}, got {said!r}".replace(
            "one of ,", "set,"
        )
    if kind in ("model_type", "model_attributes_type", "dict_type", "dataclass_type"):
        return f"must be a mapping such as {{name: value}}, got {given!r}"
    if kind in ("tuple_type", "list_type"):
        return f"must be a list such as [a, b], got {given!r}"
    reason = str(finding["msg"]).removeprefix("Value error, ")
    is_told = kind == "value_error" or isinstance(given, dict | list | tuple)
    return reason if is_told else f"{reason}, got {given!r}"


def _meant(name: str) -> str:
    """What somebody may have meant by a name that there is not."""
    if name in _KINDS:
        return f"; write policies: [{{kind: {name}, ...}}], or actuator: {{kind: {name}, ...}}"
    near = difflib.get_close_matches(name, sorted(_names()), n=2)
    return f"; do you mean {' or '.join(repr(one) for one in near)}?" if near else ""


def _names() -> set[str]:
    """All names that a scaling file may have, wherever."""
    names, models = set(), [Setting]
    while models:
        model = models.pop()
        models += model.__subclasses__()
        names |= {field.alias or name for name, field in model.model_fields.items()}
    return names


def _below(node: yaml.Node, part: Any) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part]
    return None


def _repeated_key(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first key that a mapping has twice, of which YAML would silently take the last."""
    if isinstance(node, yaml.SequenceNode):
        return next((found for item in node.value if (found := _repeated_key(item)) is not None), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    seen: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                return key
            seen.add(key.value)
        if (found := _repeated_key(value)) is not None:
            return found
    return None
