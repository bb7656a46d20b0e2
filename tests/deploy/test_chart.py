"""The Helm chart: what it renders is valid, fits together, and is what the commands and the scaling file understand."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import kubernetes_validate
import pytest
import typer
import yaml

from autoscaler_svc.keda import Trigger
from autoscaler_svc.scaling_file import parse_scaling
from paceline_cli.main import app

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy/kubernetes/paceline"
EXAMPLES = ROOT / "deploy/kubernetes/examples"
FROM_VENV = Path(sys.prefix) / "helm-bin/helm"

KUBERNETES = ["1.27", "1.33", "1.37"]  # the oldest that the chart allows, and newer ones
NOT_OF_KUBERNETES = {"ScaledObject"}  # KEDA's; its schema is not in kubernetes-validate

KEDA = ["-f", str(EXAMPLES / "keda.yaml")]
FAKE = ["-f", str(EXAMPLES / "fake.yaml")]
TWO_TYPES = ["-f", str(EXAMPLES / "two-gpu-types.yaml")]
TENSOR_PARALLEL = ["-f", str(EXAMPLES / "tensor-parallel.yaml")]
VALUES = {
    "default": [],
    "fake": FAKE,
    "two types": TWO_TYPES,
    "tensor parallel": TENSOR_PARALLEL,
    "keda": KEDA,
    "keda, two types": [*TWO_TYPES, *KEDA, "--set-string", "autoscaling.keda.tolerance=0"],
    "nothing scales": [*TWO_TYPES, "--set", "autoscaling.kind=none"],
    "no journal": ["--set", "scheduler.journal.enabled=false,scheduler.drainTimeout=90"],
    "everything said": [
        *TWO_TYPES,
        "--set",
        "images.pullSecrets[0].name=s,scheduler.journal.existingClaim=c,scheduler.extraArgs={--policy,fair}",
        "--set-string",
        "executors.extraArgs={--dtype,bfloat16},executors.nodeTypes[0].extraArgs={--max-num-seqs,32}",
        "--set",
        "executors.nodeTypes[0].runtimeClassName=nvidia,executors.maxUnavailable=25%,networkPolicy.clients=null",
        "--set",
        "scheduler.service.type=LoadBalancer,scheduler.nodeSelector.disk=ssd,executors.drainTimeout=120",
        "--set",
        "executors.cacheClaim=compiled",
    ],
}
every_set = pytest.mark.parametrize("values", list(VALUES.values()), ids=list(VALUES))


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    program = FROM_VENV if FROM_VENV.exists() else shutil.which("helm")
    if program is None:
        pytest.skip(f"no helm: neither {FROM_VENV}, which `make test` gets from npm, nor one on the PATH")
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=False)


@functools.cache
def _rendered(values: tuple[str, ...]) -> str:
    done = helm("template", "try", str(CHART), "--namespace", "llm", *values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(values: list[str]) -> list[dict]:
    return [manifest for manifest in yaml.safe_load_all(_rendered(tuple(values))) if manifest]


def of_kind(manifests: list[dict], *kinds: str) -> dict[str, dict]:
    """The manifests of these kinds, by name."""
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in kinds}


def workloads(manifests: list[dict]) -> dict[str, dict]:
    return of_kind(manifests, "Deployment", "StatefulSet")


def executors(manifests: list[dict]) -> dict[str, dict]:
    return {name: m for name, m in of_kind(manifests, "Deployment").items() if "-executor-" in name}


def pod(workload: dict) -> dict:
    return workload["spec"]["template"]["spec"]


def container(workload: dict) -> dict:
    (only,) = pod(workload)["containers"]
    return only


def environment(workload: dict) -> dict[str, object]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container(workload)["env"]}


def command_line(workload: dict) -> list[str]:
    return [*container(workload)["command"], *container(workload)["args"]]


def parsed(words: list[str]) -> click.Context:
    """What the command line understands of the words, without doing it. Raises `click.UsageError`."""
    program, *rest = words
    assert program == "paceline"
    command, context = typer.main.get_command(app), None
    while True:
        if not hasattr(command, "commands"):
            return command.make_context(command.name, rest, parent=context)
        context = click.Context(command, parent=context)
        command, rest = command.commands[rest[0]], rest[1:]


# --- valid ----------------------------------------------------------------------------------------------------------


@every_set
def test_helm_has_nothing_to_say(values):
    """A warning of the linter is an installation that fails for somebody."""
    done = helm("lint", "--strict", str(CHART), *values)

    assert done.returncode == 0, done.stdout + done.stderr


@every_set
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(values, version):
    """A misspelled field is dropped without a word by one cluster and refused by the next."""
    for manifest in render(values):
        if manifest["kind"] not in NOT_OF_KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["--set", "autoscaling.kind=hpa"], "autoscaling"),
        (["--set", "autoscaler.kind=keda"], "autoscaler"),  # no such section
        (["--set", "model.claim="], "claim"),
        (["--set", "model.folder=/elsewhere"], "folder"),
        (["--set", "executors.nodeTypes=null"], "nodeTypes"),
        (["--set", "executors.nodeTypes[0].name=L4"], "name"),
        (["--set", "executors.nodeTypes[0].name=a,executors.nodeTypes[0].gpus=2"], "gpus"),
        (["--set", "executors.nodeTypes[0].name=a,executors.nodeTypes[0].replicas=-1"], "replicas"),
        (["--set", "executors.drainTimeout=30s"], "drainTimeout"),
        (["--set", "scheduler.maxUnavailable=2"], "maxUnavailable"),
        (["--set", "autoscaling.config.executors.max=0"], "max"),
        (["--set", "autoscaling.kind=keda,autoscaling.keda.metric=tokens"], "target"),
    ],
)
def test_a_wrong_value_is_refused(values, reason):
    """A setting that is silently ignored is found out when the bill or the outage comes."""
    done = helm("lint", "--strict", str(CHART), *values)

    assert done.returncode != 0
    assert reason in done.stdout + done.stderr


def test_two_types_of_one_name_are_refused():
    """Their Deployments would have one name, and one of them would be no more."""
    done = helm("template", "try", str(CHART), "--set", "executors.nodeTypes[0].name=a,executors.nodeTypes[1].name=a")

    assert done.returncode != 0
    assert "has 'a' twice" in done.stderr


# --- fits together --------------------------------------------------------------------------------------------------


@every_set
def test_names_are_there_once(values):
    """Of two manifests with one name the second wins, whichever that is."""
    names = [(m["kind"], m["metadata"]["name"]) for m in render(values)]

    assert len(set(names)) == len(names)
    assert all(len(name) <= 63 for _, name in names)


@every_set
def test_selectors_match_the_pods_they_mean(values):
    """A selector that matches nothing makes a Service without endpoints, and a policy that protects nobody."""
    manifests = render(values)
    labels = {name: m["spec"]["template"]["metadata"]["labels"] for name, m in workloads(manifests).items()}

    def selected(selector: dict) -> set[str]:
        return {name for name, has in labels.items() if selector.items() <= has.items()}

    for name, workload in workloads(manifests).items():
        assert selected(workload["spec"]["selector"]["matchLabels"]) == {name}
    for name, service in of_kind(manifests, "Service").items():
        assert selected(service["spec"]["selector"]) == {name}
        ports = {port["name"] for port in container(workloads(manifests)[name])["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for name, budget in of_kind(manifests, "PodDisruptionBudget").items():
        assert selected(budget["spec"]["selector"]["matchLabels"]) == {name}
    policies = of_kind(manifests, "NetworkPolicy")
    protected = [selected(policy["spec"]["podSelector"]["matchLabels"]) for policy in policies.values()]
    assert set().union(*protected) == labels.keys()


@every_set
def test_what_is_mounted_is_there(values):
    """A pod that names a volume which it does not have is refused when it is made, long after the installation."""
    for workload in workloads(render(values)).values():
        volumes = {volume["name"] for volume in pod(workload).get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}

        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == volumes


@every_set
def test_everything_runs_without_privileges(values):
    """The strictest profile of Pod Security, and no token of the cluster for who does not need it."""
    manifests = render(values)
    for name, workload in workloads(manifests).items():
        assert pod(workload)["securityContext"]["runAsNonRoot"]
        assert pod(workload)["securityContext"]["runAsUser"] == 10001
        assert pod(workload)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(workload)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"name": "tmp", "mountPath": "/tmp"} in container(workload)["volumeMounts"]
        acts = name.endswith("-autoscaler") and bool(of_kind(manifests, "Role"))
        assert pod(workload)["automountServiceAccountToken"] is acts


def test_executors_are_reached_by_their_scheduler_alone():
    """The step stream has no TLS and no tokens, and whoever speaks it computes for nothing."""
    manifests = render(VALUES["keda"])
    policies = of_kind(manifests, "NetworkPolicy")
    scheduler = workloads(manifests)["try-paceline-scheduler"]["spec"]["selector"]

    (rule, metrics) = policies["try-paceline-executor"]["spec"]["ingress"]
    assert rule == {"from": [{"podSelector": scheduler}], "ports": [{"protocol": "TCP", "port": 50061}]}
    assert metrics == {"from": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 9101}]}
    (_, keda) = policies["try-paceline-autoscaler"]["spec"]["ingress"]
    assert keda["ports"] == [{"protocol": "TCP", "port": 50071}]
    assert keda["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "keda"}}}]
    clients, _ = policies["try-paceline-scheduler"]["spec"]["ingress"]
    assert {"podSelector": {}} in clients["from"]
    assert not of_kind(render(["--set", "networkPolicy.enabled=false"]), "NetworkPolicy")


# --- is understood --------------------------------------------------------------------------------------------------


@every_set
def test_the_commands_know_their_words(values, monkeypatch):
    """A flag that was renamed shows as a pod that crashes again and again."""
    for variable in [name for name in os.environ if name.startswith("PACELINE_")]:
        monkeypatch.delenv(variable)
    for workload in workloads(render(values)).values():
        context = parsed(command_line(workload))
        known = {parameter.envvar for parameter in context.command.params}
        given = {name for name in environment(workload) if name.startswith("PACELINE_")}
        assert given <= known | {"PACELINE_CACHE"}
        assert pod(workload)["enableServiceLinks"] is False  # or Services would set such variables


@every_set
def test_probes_ask_at_ports_that_are_listened_on(values):
    """A probe of another port kills a healthy pod for ever."""
    for name, workload in workloads(render(values)).items():
        ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container(workload)[probe]
            if "grpc" in asked:
                assert asked["grpc"]["port"] in ports.values()
            else:
                assert name.endswith("-autoscaler")
                assert asked["httpGet"] == {"path": "/metrics", "port": "metrics"}
        assert all(str(port) in " ".join(command_line(workload)) for key, port in ports.items() if key != "keda")


def test_loading_a_model_may_take_as_long_as_is_said():
    """A pod that is killed while it loads begins again, and never gets ready."""
    (executor,) = executors(render(["--set", "executors.startupLimit=1802"])).values()
    probe = container(executor)["startupProbe"]

    assert 1802 <= probe["periodSeconds"] * probe["failureThreshold"] < 1802 + probe["periodSeconds"]
    assert executor["spec"]["progressDeadlineSeconds"] > 1802


# --- leaving --------------------------------------------------------------------------------------------------------


@every_set
def test_a_pod_has_the_time_that_its_drain_takes(values):
    """Killed before that, requests are computed again elsewhere from the beginning."""
    for name, workload in workloads(render(values)).items():
        if name.endswith("-autoscaler"):
            continue  # what it launched goes on without it
        grace = pod(workload)["terminationGracePeriodSeconds"]
        drain = int(environment(workload)["PACELINE_DRAIN_TIMEOUT"])
        assert grace >= drain + 20
        if "-executor-" in name:
            (shell, flag, line) = container(workload)["lifecycle"]["preStop"]["exec"]["command"]
            assert (shell, flag) == ("sh", "-c")
            assert line.endswith(" || true")  # the scheduler may be gone; SIGTERM drains then
            words = line.removesuffix(" || true").replace('"', "").split()
            drained = parsed(words).params
            assert drained["finish_within"] == drain
            assert drained["executor"] == "$PACELINE_EXECUTOR_ID"
            assert drained["server"] == "try-paceline-scheduler:50051"
            assert grace >= drained["finish_within"] + drained["timeout"] + drain + 10


def test_the_hook_goes_on_when_the_scheduler_is_gone(tmp_path):
    """A hook that fails shows as an event that somebody looks into; one that hangs takes the time of the drain."""
    (executor,) = executors(render(VALUES["default"])).values()
    (*shell, line) = container(executor)["lifecycle"]["preStop"]["exec"]["command"]
    line = line.replace("try-paceline-scheduler:50051", f"unix:{tmp_path}/nobody")
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    done = subprocess.run(
        [*shell, line],
        env={"PATH": search, "PACELINE_EXECUTOR_ID": "a", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0
    assert "no server answers" in done.stderr


def test_the_hook_ends_an_executor_that_runs(tmp_path):
    """The command lines of the chart, with other addresses: what is written there starts, joins and leaves."""
    manifests = render(VALUES["fake"])
    (executor,) = executors(manifests).values()
    addresses = {
        "try-paceline-scheduler:50051": f"unix:{tmp_path}/scheduler",
        "0.0.0.0:50051": f"unix:{tmp_path}/scheduler",
        "0.0.0.0:50061": f"unix:{tmp_path}/executor",
        "$(POD_IP):50061": f"unix:{tmp_path}/executor",
        "/journal/journal.db": f"{tmp_path}/journal.db",
        "9100": "-1",
        "9101": "-1",
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    surroundings = {"PATH": path, "HOME": str(tmp_path), "PACELINE_EXECUTOR_ID": "pod-a"}

    def start(workload: dict) -> subprocess.Popen:
        own = {name: value for name, value in environment(workload).items() if isinstance(value, str)}
        words = [addresses.get(word, word) for word in command_line(workload)]
        return subprocess.Popen(words, env={**own, **surroundings}, stderr=subprocess.DEVNULL)

    def ask(*words: str) -> str:
        return subprocess.run(words, env=surroundings, capture_output=True, text=True, timeout=60, check=False).stdout

    (*shell, line) = container(executor)["lifecycle"]["preStop"]["exec"]["command"]
    scheduler_process, executor_process = start(workloads(manifests)["try-paceline-scheduler"]), start(executor)
    try:
        listing = ("paceline", "fleet", "list", "--json", "--server", addresses["0.0.0.0:50051"])
        while "pod-a" not in (seen := ask(*listing)):
            assert (scheduler_process.poll(), executor_process.poll()) == (None, None), seen
        assert "DURABILITY_ON" in seen

        told = ask(*shell, line.replace("try-paceline-scheduler:50051", addresses["0.0.0.0:50051"]))

        assert "pod-a has left" in told
        assert executor_process.wait(30) == 0
        scheduler_process.terminate()
        assert scheduler_process.wait(30) == 0
    finally:
        for process in (scheduler_process, executor_process):
            process.kill()
            process.wait()


def test_a_scheduler_with_a_journal_leaves_at_once():
    """The next one goes on with everything, and users wait for nothing but its start."""
    journalled = workloads(render(VALUES["default"]))["try-paceline-scheduler"]
    without = workloads(render(VALUES["no journal"]))["try-paceline-scheduler"]

    assert environment(journalled)["PACELINE_DRAIN_TIMEOUT"] == "0"
    assert parsed(command_line(journalled)).params["journal"] == "/journal/journal.db"
    assert journalled["kind"] == "StatefulSet"  # never two at a time
    assert journalled["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "journal"
    assert environment(without)["PACELINE_DRAIN_TIMEOUT"] == "90"
    assert "--journal" not in command_line(without)
    assert "volumeClaimTemplates" not in without["spec"]


# --- executors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [VALUES["default"], VALUES["two types"], VALUES["keda"]])
def test_executors_ask_for_their_gpu(values):
    """Without that they are put on any node, and share a GPU or have none."""
    for executor in executors(render(values)).values():
        assert container(executor)["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert "cuda" in command_line(executor)
        assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pod(executor)["tolerations"])


def volumes(workload: dict) -> dict[str, dict]:
    """What a pod has mounted where."""
    by_name = {volume["name"]: volume for volume in pod(workload)["volumes"]}
    return {mount["mountPath"]: by_name[mount["name"]] for mount in container(workload)["volumeMounts"]}


def test_a_model_is_spread_over_the_gpus_that_its_executor_gets():
    """Without the flag all but one of them would idle; without the memory NCCL does not start."""
    (spread,) = executors(render(TENSOR_PARALLEL)).values()
    (alone,) = executors(render(VALUES["default"])).values()

    count = container(spread)["resources"]["limits"]["nvidia.com/gpu"]
    assert parsed(command_line(spread)).params["tensor_parallel"] == count == 4
    assert volumes(spread)["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert "--tensor-parallel" not in command_line(alone)
    assert "/dev/shm" not in volumes(alone)


def test_a_part_of_a_gpu_is_one_too():
    """Its resource has another name; an executor that missed it would run on the CPU and say nothing."""
    limits = "executors.nodeTypes[0].name=part,executors.nodeTypes[0].resources.limits.nvidia\\.com/mig-3g\\.40gb=1"
    (executor,) = executors(render(["--set", limits])).values()

    assert parsed(command_line(executor)).params["device"] == "cuda"
    assert "--tensor-parallel" not in command_line(executor)


def test_compiled_kernels_may_outlive_a_pod():
    """Compiling them again is part of what users wait for while an executor starts."""
    (ephemeral,) = executors(render(VALUES["default"])).values()
    kept = executors(render(VALUES["everything said"]))["try-paceline-executor-l4"]

    assert environment(kept)["PACELINE_CACHE"] == environment(ephemeral)["PACELINE_CACHE"] == "/cache"
    assert volumes(ephemeral)["/cache"]["emptyDir"] == {}
    assert volumes(kept)["/cache"]["persistentVolumeClaim"] == {"claimName": "compiled"}


def test_each_type_of_node_has_its_own_executors():
    """That is how a scaler, or somebody at a keyboard, says on which nodes there shall be more."""
    there = executors(render(VALUES["two types"]))

    assert there.keys() == {"try-paceline-executor-l4", "try-paceline-executor-h100"}
    selectors = [pod(executor)["nodeSelector"]["nvidia.com/gpu.product"] for executor in there.values()]
    assert len(set(selectors)) == 2


def test_an_executor_is_named_like_its_pod():
    """The autoscaler drains executors and deletes pods: it has to be the same one."""
    (executor,) = executors(render(VALUES["default"])).values()

    assert environment(executor)["PACELINE_EXECUTOR_ID"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert environment(executor)["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert "$(POD_IP):50061" in command_line(executor)


def test_without_a_model_nothing_is_mounted_and_no_gpu_is_asked_for():
    """A try is a try on any cluster."""
    manifests = render(VALUES["fake"])

    assert "models" not in json.dumps(manifests)
    assert "nvidia" not in json.dumps(manifests)
    assert all("fake" in command_line(workload) for workload in workloads(manifests).values())


@every_set
def test_only_one_says_how_many_there_are(values):
    """A `replicas` that stands there sets back, with each upgrade, what a scaler has found out."""
    manifests = render(values)
    scales = bool(of_kind(manifests, "ConfigMap"))

    assert all(("replicas" in executor["spec"]) is not scales for executor in executors(manifests).values())


def test_no_executor_at_all_can_be_said():
    """Zero is a number, and not one that was left out."""
    (executor,) = executors(
        render(["--set", "executors.nodeTypes[0].name=a,executors.nodeTypes[0].replicas=0"])
    ).values()

    assert executor["spec"]["replicas"] == 0


# --- autoscaling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two types", "keda", "keda, two types", "everything said"])
def test_the_autoscaler_understands_its_file(name):
    """It exits at a wrong file, and nothing scales."""
    manifests = render(VALUES[name])
    (content,) = of_kind(manifests, "ConfigMap").values()
    settings = parse_scaling(content["data"]["scaling.yaml"], "scaling.yaml")

    for executor in executors(manifests).values():
        assert f"{settings.times.finish_s:g}" == environment(executor)["PACELINE_DRAIN_TIMEOUT"]
    assert settings.executors.max == 8
    if settings.actuator.kind == "kubernetes":
        assert settings.actuator.namespace == "llm"
        assert set(settings.actuator.deployments.values()) == executors(manifests).keys()
        assert [(one.name, one.price_per_hour, one.max) for one in settings.node_types] == [
            ("l4", 0.8, 10_000),
            ("h100", 4.0, 2),
        ]
    else:
        assert settings.keda.listen == "0.0.0.0:50071"
        assert settings.cooldowns.zero_s == 600


def test_the_autoscaler_may_do_what_it_has_to_and_no_more():
    """It sets the replicas of these Deployments, and marks pods; it neither makes nor deletes anything."""
    manifests = render(VALUES["two types"])
    (role,) = of_kind(manifests, "Role").values()
    (binding,) = of_kind(manifests, "RoleBinding").values()
    autoscaler = workloads(manifests)["try-paceline-autoscaler"]

    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": pod(autoscaler)["serviceAccountName"], "namespace": "llm"}
    ]
    rules = {rule["resources"][0]: rule for rule in role["rules"]}
    assert rules.keys() == {"pods", "deployments", "deployments/scale"}
    assert set(rules["pods"]["verbs"]) == {"get", "list", "patch"}
    assert set(rules["deployments/scale"]["verbs"]) == {"get", "update", "patch"}
    for name in ("deployments", "deployments/scale"):
        assert set(rules[name]["resourceNames"]) == executors(manifests).keys()
    assert not of_kind(render(VALUES["keda"]), "Role", "RoleBinding")  # KEDA acts, and has rights of its own


@pytest.mark.parametrize("name", ["keda", "keda, two types"])
def test_keda_scales_the_executors(name):
    """Another target, or a metric of another name, is an error that shows in the ScaledObject and nowhere else."""
    manifests = render(VALUES[name])
    scaled = of_kind(manifests, "ScaledObject")
    (service,) = (one for one in of_kind(manifests, "Service") if one.endswith("-autoscaler"))

    assert scaled.keys() == executors(manifests).keys()
    for target, one in scaled.items():
        spec = one["spec"]
        assert one["apiVersion"] == "keda.sh/v1alpha1"
        assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": target}
        assert 0 <= spec["minReplicaCount"] <= spec["maxReplicaCount"] <= 8
        (trigger,) = spec["triggers"]
        assert (trigger["type"], trigger["metricType"]) == ("external-push", "AverageValue")
        assert trigger["metadata"]["scalerAddress"] == f"{service}.llm:50071"
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        understood = Trigger.of(trigger["metadata"])
        assert understood.target == len(scaled)  # the metric is a total: each type has its share
        for direction in ("scaleUp", "scaleDown"):
            behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"][direction]
            assert behavior["stabilizationWindowSeconds"] == 0
            assert ("tolerance" in behavior) is (name == "keda, two types")


def test_the_behavior_that_keda_hands_on_is_one_of_an_autoscaler():
    """KEDA copies it into the HPA that it makes."""
    (scaled,) = of_kind(render(VALUES["keda"]), "ScaledObject").values()
    hpa = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "a"},
        "spec": {
            "scaleTargetRef": scaled["spec"]["scaleTargetRef"],
            "maxReplicas": scaled["spec"]["maxReplicaCount"],
            "behavior": scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        },
    }

    kubernetes_validate.validate(hpa, KUBERNETES[-1], strict=True)


def test_a_change_of_policies_does_not_restart_the_autoscaler():
    """It reads its file again by itself, and knows then what arrived before."""

    def checksum(*more: str) -> str:
        autoscaler = workloads(render([*VALUES["two types"], *more]))["try-paceline-autoscaler"]
        return autoscaler["spec"]["template"]["metadata"]["annotations"]["checksum/actuator"]

    assert checksum("--set", "autoscaling.config.executors.max=9") == checksum()
    assert checksum("--set", "executors.nodeTypes[0].name=a100") != checksum()  # another actuator


def test_the_readme_names_values_that_exist():
    """Documentation of a setting that was renamed costs an afternoon."""
    text = (CHART.parent / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    sections = "|".join(values)

    for path in set(re.findall(rf"`((?:{sections})\.[A-Za-z.]+)", text)):
        found = values
        for key in path.split("."):
            found = found[0] if isinstance(found, list) else found
            assert key in found, path
            found = found[key]
