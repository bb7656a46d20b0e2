"""docker compose and the images: valid, wired as the commands and each other say, and hardened."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import click
import pytest
import typer
import yaml

from autoscaler_svc.scaling_file import read_scaling_file
from autoscaler_svc.scaling_settings import Keda
from paceline_cli.main import app

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = ROOT / "docker-compose.yml"
GPU = DEPLOY / "docker/gpu.yml"
TENSOR_PARALLEL = DEPLOY / "docker/tensor-parallel.yml"
DOCKERFILE = DEPLOY / "docker/Dockerfile"
OURS = ("prepare", "scheduler", "executor", "autoscaler")

SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
every_service = pytest.mark.parametrize("name", list(SERVICES))


def tool(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / name
    if not program.exists():
        pytest.skip(f"no {name} beside this Python; `make setup` brings it")
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)


def command(*verbs: str) -> click.Command:
    """A command of `paceline`."""
    found: Any = typer.main.get_command(app)
    for verb in verbs:
        found = found.commands[verb]
    return found


def variables(*verbs: str) -> set[str]:
    """Environment variables that a command reads."""
    names = [parameter.envvar for parameter in command(*verbs).params if parameter.envvar]
    return {name for envvar in names for name in ([envvar] if isinstance(envvar, str) else envvar)}


def flags(*verbs: str) -> set[str]:
    return {option for parameter in command(*verbs).params for option in parameter.opts}


VERBS = {
    "prepare": ("prepare",),
    "scheduler": ("scheduler",),
    "executor": ("executor",),
    "autoscaler": ("autoscaler", "run"),
}


def stages() -> dict[str, str]:
    """The stages of the Dockerfile by name, each with its lines."""
    parts = re.split(r"^FROM \S+ AS (\S+)\n", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def mounts(name: str) -> dict[str, str]:
    """What a container has where: path in it -> folder or volume."""
    return {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES[name].get("volumes", ())}


def where_it_is(name: str, path: str) -> Path:
    """A path in a container, in this repository."""
    for place, source in mounts(name).items():
        if source.startswith("./") and path.startswith(place):
            return ROOT / source / path[len(place) :].lstrip("/")
    raise AssertionError(f"{name} has nothing of ours at {path}")


@pytest.mark.parametrize("file", [COMPOSE, GPU, TENSOR_PARALLEL], ids=lambda file: file.name)
def test_compose_files_have_the_form_that_docker_reads(file):
    """No engine is here to try it: the schema finds a wrong key before a user does."""
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_has_no_known_mistakes():
    """What a linter knows need not be found by whoever builds the images."""
    done = tool("hadolint", DOCKERFILE)

    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_an_image_for_each_service():
    """A target that the Dockerfile does not have is found out at the first build."""
    targets = {SERVICES[name]["build"]["target"] for name in OURS}

    assert targets <= stages().keys()
    for name in OURS:
        build = SERVICES[name]["build"]
        assert (ROOT / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE


def test_images_get_every_package_and_nothing_else_of_the_repository():
    """A package that .dockerignore keeps out is an image that does not start."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}

    assert kept == packages | {"client", "pyproject.toml", project["project"]["readme"], "LICENSE"}


def test_only_executors_carry_torch():
    """The scheduler's image is to be pulled in seconds."""
    assert "torch" in stages()["build-executor"].lower()
    assert not re.search(r"torch|executor|all\]", stages()["build-scheduler"].lower())
    assert not re.search(r"torch|executor|all\]", stages()["build-autoscaler"].lower())


@pytest.mark.parametrize("name", OURS)
def test_containers_set_only_what_their_command_reads(name):
    """A misspelt variable is ignored without a word, and the default holds."""
    given = {variable for variable in SERVICES[name]["environment"] if variable.startswith("PACELINE_")}

    assert given <= variables(*VERBS[name]) | {"PACELINE_CACHE"}


@pytest.mark.parametrize("file", [GPU, TENSOR_PARALLEL], ids=lambda file: file.name)
def test_files_for_gpus_are_about_services_that_there_are(file):
    """An override of a service that was renamed starts a broken second one."""
    for name, service in yaml.safe_load(file.read_text())["services"].items():
        base = service.get("extends", {"file": COMPOSE.name, "service": name})
        assert base == {"file": COMPOSE.name, "service": "executor"}  # relative to the first file of the command line
        assert set(service["environment"]) <= variables("executor")
        assert service["environment"]["PACELINE_DEVICE"] == "cuda"
        assert service["scale"] == 1  # the others of a service have the same GPU


def devices(service: dict[str, Any]) -> dict[str, Any]:
    """What a service reserves."""
    (only,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (only["driver"], only["capabilities"]) == ("nvidia", ["gpu"])
    return only


def test_each_executor_has_a_gpu_of_its_own():
    """Two on one would each take nine tenths of its memory, and the second would not start."""
    services = yaml.safe_load(GPU.read_text())["services"]
    with_profile = {
        profile: [
            ids
            for service in services.values()
            if profile in service.get("profiles", [profile])
            for ids in devices(service)["device_ids"]
        ]
        for profile in ("none", "2-gpus", "4-gpus")
    }

    assert with_profile == {"none": ["0"], "2-gpus": ["0", "1"], "4-gpus": ["0", "1", "2", "3"]}


def test_a_model_on_several_gpus_gets_as_many_as_it_is_spread_over():
    """One fewer and it does not start; Docker's own /dev/shm is too small for what NCCL puts there."""
    (service,) = yaml.safe_load(TENSOR_PARALLEL.read_text())["services"].values()

    assert devices(service)["count"] == service["environment"]["PACELINE_TENSOR_PARALLEL"] == "${GPUS:-2}"
    assert service["shm_size"] == "1gb"


def test_the_image_asks_for_what_a_driver_has_to_bring_and_for_no_gpu():
    """`NVIDIA_VISIBLE_DEVICES=all` in an image gives every GPU of a host to containers that were given none."""
    (said,) = re.findall(r"^ENV (PACELINE_CACHE=.*)", stages()["executor"], re.MULTILINE)

    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in said.split()
    assert "ENV NVIDIA_VISIBLE" not in DOCKERFILE.read_text()


def test_build_arguments_of_compose_are_those_of_the_dockerfile():
    """An argument that the Dockerfile does not declare is dropped with a warning that nobody reads."""
    declared = set(re.findall(r"^ARG (\w+)=", stages()["build-executor"], re.MULTILINE))

    assert SERVICES["executor"]["build"]["args"].keys() <= declared == {"TORCH", "TORCH_INDEX", "FLASHINFER"}


def test_flashinfer_is_only_installed_where_it_is_asked_for():
    """It needs a compiler of gigabytes, and every executor does without it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r'if \[ -n "\$FLASHINFER" \]; then.*?\bfi\n', stages()["build-executor"], re.DOTALL)

    assert ["'.[flashinfer]'" in words and "nvcc" in words for words in asked] == [True]
    assert extras["flashinfer"]
    assert "flashinfer" not in "".join(extras["all"] + extras["executor"])


def test_entry_points_use_flags_that_there_are():
    """A container whose command is refused restarts for ever."""
    text = "\n".join(" ".join(SERVICES[name].get("entrypoint", ())) for name in OURS) + DOCKERFILE.read_text()
    said = set(re.findall(r"paceline executor .*", text))
    assert said

    for line in said:
        assert set(re.findall(r"--[a-z-]+", line)) <= flags("executor")
    for stage, verbs in (("scheduler", ("scheduler",)), ("executor", ("executor",))):
        (last,) = re.findall(r"^CMD (\[.*\])", stages()[stage], re.MULTILINE)
        assert set(re.findall(r"--[a-z-]+", last)) <= flags(*verbs)


@every_service
def test_nobody_is_root_or_can_become_it(name):
    """What breaks into a container finds nothing to write to and no right to take."""
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert not {"privileged", "user", "cap_add", "network_mode", "pid"} & service.keys()


def test_our_images_run_as_a_user_of_their_own():
    """Compose says nothing of users: the images do."""
    run = stages()["run"]

    assert re.search(r"^USER 10001$", run, re.MULTILINE)
    assert re.findall(r"^USER (\w+)$", stages()["run-executor"], re.MULTILINE)[-1] == "10001"
    for target, base in (
        ("scheduler", "run"),
        ("run-executor", "run"),
        ("executor", "run-executor"),
        ("autoscaler", "run"),
    ):
        assert "USER" not in stages()[target] or target == "run-executor"
        assert re.search(rf"^FROM {base} AS {target}$", DOCKERFILE.read_text(), re.MULTILINE)


def test_executors_can_build_their_steps_and_keep_them():
    """Without a compiler, or a place of their own to write to, they would run in torch, at a third of the speed."""
    assert re.search(r"apt-get install .*\bg\+\+", stages()["run-executor"])
    assert "install -d -o 10001 /cache" in stages()["run-executor"]
    assert SERVICES["executor"]["environment"]["PACELINE_CACHE"] in mounts("executor")


@every_service
def test_a_container_says_whether_it_is_well(name):
    """`docker compose ps` and what depends on it go by that."""
    check = SERVICES[name]["healthcheck"]

    assert check.get("disable") is (True if name == "prepare" else None)
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert how["condition"] in ("service_started", "service_healthy", "service_completed_successfully")
        assert how["condition"] != "service_completed_successfully" or other == "prepare"


@every_service
def test_what_is_mounted_is_there(name):
    """Docker makes an empty folder of a path that is not there, and the service starts without its configuration."""
    volumes = yaml.safe_load(COMPOSE.read_text())["volumes"]

    for source in mounts(name).values():
        assert (ROOT / source).exists() if source.startswith("./") else source in volumes


def test_images_of_others_have_a_version():
    """What ran yesterday runs tomorrow."""
    for name in SERVICES.keys() - set(OURS):
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_only_the_service_itself_is_open_to_the_network():
    """Dashboards, traces and metrics know no passwords: they are for this machine."""
    published = {port for service in SERVICES.values() for port in service.get("ports", ())}

    assert {port for port in published if not port.startswith("127.0.0.1:")} == {"50051:50051"}


def test_executors_are_two_and_have_names_of_their_own():
    """Two under one name or address would push each other out of the fleet."""
    said = " ".join(SERVICES["executor"]["entrypoint"])

    assert SERVICES["executor"]["scale"] == 2
    assert '--advertise "$$(hostname):50061"' in said
    assert re.search(r'--executor-id "[^"]*\$\$\(hostname\)"', said)
    assert not {"container_name", "hostname", "ports"} & SERVICES["executor"].keys()


def test_prometheus_scrapes_where_the_scheduler_answers():
    """Everything that is shown begins at this address."""
    config = yaml.safe_load(where_it_is("prometheus", "/etc/prometheus/prometheus.yml").read_text())
    own, fleet = config["scrape_configs"]
    address = f"scheduler:{SERVICES['scheduler']['environment']['PACELINE_HTTP_PORT']}"

    assert own["static_configs"] == [{"targets": [address]}]
    assert [discovery["url"] for discovery in fleet["http_sd_configs"]] == [f"http://{address}/sd"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    assert f"--storage.tsdb.path={list(mounts('prometheus'))[1]}" in SERVICES["prometheus"]["command"]
    for file in config["rule_files"]:
        assert where_it_is("prometheus", f"/etc/prometheus/{file}").is_file()


def test_each_service_that_is_scraped_has_a_port_for_it():
    """The scheduler can only tell Prometheus of ports that are open."""
    ports = {name: SERVICES[name]["environment"]["PACELINE_METRICS_PORT"] for name in ("executor", "autoscaler")}

    assert ports == {"executor": "9101", "autoscaler": "9102"}
    for name, port in ports.items():
        assert re.search(rf"^EXPOSE .*\b{port}\b", stages()[name], re.MULTILINE)


def test_spans_go_where_jaeger_listens():
    """4317 is where Jaeger takes OTLP by gRPC."""
    to = urlparse(SERVICES["scheduler"]["environment"]["PACELINE_OTLP_ENDPOINT"])

    assert (to.scheme, to.hostname, to.port) == ("http", "jaeger", 4317)


def test_grafana_finds_its_sources_and_its_dashboards():
    """An empty Grafana is what a wrong path looks like."""
    sources = yaml.safe_load(where_it_is("grafana", "/etc/grafana/provisioning/datasources/paceline.yml").read_text())
    providers = yaml.safe_load(where_it_is("grafana", "/etc/grafana/provisioning/dashboards/paceline.yml").read_text())
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    for source in sources["datasources"]:
        to = urlparse(source["url"])
        published = [port.rpartition(":")[2] for port in SERVICES[to.hostname]["ports"]]
        assert str(to.port) in published
    for provider in providers["providers"]:
        assert [*where_it_is("grafana", provider["options"]["path"]).glob("*.json")]
    assert where_it_is("grafana", home).is_file()


def test_grafana_knows_how_often_prometheus_scrapes_and_where_traces_are():
    """Rates over less than two scrapes are empty; an exemplar without a place is only a dot."""
    file = DEPLOY / "grafana/provisioning/datasources/paceline.yml"
    by_type = {source["type"]: source for source in yaml.safe_load(file.read_text())["datasources"]}
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    explore, jaeger = by_type["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]

    assert by_type["prometheus"]["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert (explore["name"], explore["datasourceUid"]) == ("trace_id", by_type["jaeger"]["uid"])
    assert jaeger["url"].startswith(f"http://localhost:{urlparse(by_type['jaeger']['url']).port}/trace/")
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]


def test_the_autoscaler_only_says_what_it_would_do():
    """It cannot start containers, and must not end any."""
    (_, inside), *_ = [(source, place) for place, source in mounts("autoscaler").items()]
    settings = read_scaling_file(where_it_is("autoscaler", inside))
    assert settings.keda is not None

    assert isinstance(settings.actuator, Keda)
    assert (settings.executors.min, settings.executors.max) == (1, 4)
    assert f'"run", "{inside}"' in stages()["autoscaler"]
    asked = SERVICES["autoscaler"]["healthcheck"]["test"][-1]
    assert asked.rpartition(":")[2] == settings.keda.listen.rpartition(":")[2]
