"""The scaling file: what it may say, and how a wrong one is refused."""

import re
from pathlib import Path

import pytest

from autoscaler_svc.policies.slo import Slo
from autoscaler_svc.scaling_file import ScalingFileError, parse_scaling, read_scaling_file

WHOLE = """\
executors: {min: 0, max: 8, max_cost_per_hour: 12.5}
targets: {first_token: 1500ms, per_token: 0.05}
policies:
  - {kind: slo, quantile: 0.95}
  - {kind: threshold, signal: block_share, target: 0.8, up: {count: 2, period: 1m}}
  - {kind: concurrency, target: 32}
  - kind: schedule
    timezone: Europe/Berlin
    periods: [{days: [Mon, Fri], begin: "08:00", end: "18:00", count: 2}]
cooldowns: {up: 10s, down: 2m, zero: 10m}
times: {interval: 500ms, startup: 40s, startup_limit: 10m, finish: 1m}
node_types:
  - {name: l4, price_per_hour: 0.8}
  - {name: h100, price_per_hour: 4.0, capacity: 6, max: 2}
actuator: {kind: kubernetes, namespace: llm, deployments: {l4: exec-l4, h100: exec-h100}}
keda: {listen: "0.0.0.0:50071"}
history: /var/lib/paceline/arrivals.npz
"""


def test_everything_in_it_can_be_said():
    """One file for all that people set, in units that they write."""
    settings = parse_scaling(WHOLE, "scaling.yaml")

    assert settings.cooldowns.zero_s == 600
    assert settings.times.interval_s == 0.5
    assert [policy.kind for policy in settings.policies] == ["slo", "threshold", "concurrency", "schedule"]
    assert [node_type.name for node_type in settings.kinds_of_nodes] == ["l4", "h100"]


def test_one_line_is_enough():
    """Somebody who only knows how many there may be has a policy, targets and cooldowns that make sense."""
    settings = parse_scaling("executors: {max: 4}", "scaling.yaml")

    assert isinstance(settings.policies[0], Slo)
    assert settings.executors.min == 0
    assert [node_type.name for node_type in settings.kinds_of_nodes] == ["local"]


def test_targets_stand_there_once():
    """What users should see is one thing, whichever policy keeps it."""
    settings = parse_scaling(WHOLE, "scaling.yaml")

    (slo, *_) = settings.policies
    assert isinstance(slo, Slo)
    assert (slo.first_token_s, slo.per_token_s, slo.quantile) == (1.5, 0.05, 0.95)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f:1: must be a mapping that has at least executors: {max: 4}"),
        ("executors: {min: 1}", "f:1: executors: 'max' is missing"),
        ("executors: {min: 3, max: 2}", "f:1: executors: min is 3 and max 2; min must be at most max"),
        ("executors:\n  max: -1", "f:2: executors.max: Input should be greater than or equal to 1, got -1"),
        ("executors:\n  max: 4\n  mix: 1", "f:3: executors.mix: there is no such setting"),
        ("executors: {max: 4}\nexecutors: {max: 5}", "f:2: 'executors' stands there twice"),
        (
            "executors: {max: 4}\ncooldowns:\n  down: 5 minutes",
            "f:3: cooldowns.down: '5 minutes' is no duration; write 100ms, 30s, 5m, 2h or 1d",
        ),
        (
            "executors: {max: 4}\npolicies: []",
            "f:2: policies: Tuple should have at least 1 item after validation, not 0",
        ),
        ("executors: {max: 4}\npolicies:\n- {kind: slo}\n- {kind: threshold}", "f:4: policies.1: 'target' is missing"),
        (
            "executors: {max: 4}\npolicies:\n- kind: guess",
            "f:3: policies.0: kind must be one of 'threshold', 'concurrency', 'slo', 'schedule', got 'guess'",
        ),
        ("executors: {max: 4}\ntargets: {first_token: .nan}", "f:2: targets.first_token"),
        (
            "executors: {max: 4}\nactuator: {kind: keda}",
            "f:1: the actuator is keda and nothing says where KEDA asks; add keda: {listen: 0.0.0.0:50071}",
        ),
        (
            "executors: {max: 4}\nnode_types: [{name: a}]\nactuator: {kind: kubernetes, deployments: {b: x}}",
            "f:1: actuator.deployments names b and node_types a; name the same in both",
        ),
        (
            "executors: {max: 4}\nnode_types: [{name: a}]\n"
            "actuator: {kind: ray, command: [x], resources: {b: {executor: 1}}}",
            "f:1: actuator.resources names b and node_types a; name the same in both",
        ),
        (
            "executors: {max: 4}\nnode_types: [{name: gpu}]",
            "f:1: node_types names 'gpu', and the actuator is",
        ),
        (
            "executors: {max: 4, max_cost_per_hour: 1}",
            "f:1: executors.max_cost_per_hour is set and no",
        ),
        (
            "executors: {min: 3, max: 4, max_cost_per_hour: 1}\nnode_types: [{name: local, price_per_hour: 0.4}]",
            "f:1: executors.min is 3, and max_cost_per_hour, 1, is enough for 2; lower the one or raise the other",
        ),
        ("executors: {max: 4}\ntragets: {}", "f:2: tragets: there is no such setting; do you mean 'targets'"),
        (
            "executors: {max: 4}\nthreshold: {}",
            "f:2: threshold: there is no such setting; write policies",
        ),
        (
            "executors: {max: 4}\nactuator: docker",
            "f:2: actuator: must be a mapping such as {name: value}, got",
        ),
        (
            "executors: {max: 4}\ntargets: {per_token: 100}",
            "f:2: targets.per_token: Input should be less than or",
        ),
        (
            "executors: {max: 4}\npolicies: [{kind: threshold, signal: block_share, target: 70}]",
            "f:2: policies.0: target is 70 and block_share a share, 0 to 1; write 0.7?",
        ),
        ("executors: {max: 4", "f:1: no YAML: expected ',' or '}', but got '<stream end>'"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_reason(text, message):
    """A setting that is silently ignored is found out when the bill or the outage comes."""
    with pytest.raises(ScalingFileError) as refusal:
        parse_scaling(text, "f")

    assert message in str(refusal.value).splitlines()[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """A wrong path is the most common mistake."""
    with pytest.raises(ScalingFileError, match=r"cannot read .*nowhere\.yaml"):
        read_scaling_file(tmp_path / "nowhere.yaml")


def test_the_examples_of_the_guide_are_files():
    """Somebody copies them."""
    guide = (Path(__file__).parents[2] / "docs/autoscaling.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)

    assert len(examples) >= 3
    for example in examples:
        parse_scaling(example, "docs/autoscaling.md")
