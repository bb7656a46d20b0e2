"""What each part installs, held by reading the packaging files."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "accelerate", "gguf", "safetensors"}


def project(path: str) -> dict:
    return tomllib.loads((ROOT / path).read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {Requirement(requirement).name for requirement in requirements}


def test_a_scheduler_installs_no_torch():
    """A scheduler runs on a small CPU machine; gigabytes of model libraries have no place there."""
    server = project("pyproject.toml")
    installed = names(server["dependencies"]) | names(server["optional-dependencies"]["scheduler"])

    assert not installed & HEAVY
    assert names(server["optional-dependencies"]["executor"]) >= {"torch", "transformers"}


def test_the_client_installs_grpc_and_nothing_else():
    """It goes into other people's programs: every further package is one that may clash with theirs."""
    assert names(project("client/pyproject.toml")["dependencies"]) == {
        "grpcio",
        "protobuf",
        "googleapis-common-protos",
    }


@pytest.mark.parametrize("path", ["pyproject.toml", "client/pyproject.toml"])
def test_every_library_has_a_tested_range(path):
    """An open range breaks on the day of somebody else's release."""
    described = project(path)
    extras = described.get("optional-dependencies", {})
    required = described["dependencies"] + [r for name, extra in extras.items() if name != "dev" for r in extra]
    ours = {"paceline", "paceline-server"}

    for requirement in map(Requirement, required):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert requirement.name in ours or {">=", "<"} <= operators, requirement


def test_the_client_and_the_services_are_one_release():
    """Generated stubs ship with the client; services of another release would speak another contract."""
    server, client = project("pyproject.toml"), project("client/pyproject.toml")

    assert server["version"] == client["version"]
    assert f"paceline=={client['version']}" in server["dependencies"]
