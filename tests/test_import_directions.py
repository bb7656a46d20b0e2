"""The direction of imports is the design: who may know whom, held by reading every import in the tree."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("autoscaler_svc", "common", "executor_svc", "paceline", "paceline_cli", "scheduler_svc", "benchmarks", "tests")
STUBS = {"externalscaler", "paceline.v1", "paceline.internal"}

# Package -> what it may import beside the standard library and itself. A name covers what is below it.
ALLOWED = {
    # What decides: a simulator drives it as it is.
    "autoscaler_svc/policies": {"autoscaler_svc", "pydantic"},
    "autoscaler_svc": {
        "common",
        "grpc",
        "kubernetes",
        "numpy",
        "prometheus_client",
        "pydantic",
        "ray",
        "structlog",
        "urllib3",
        "yaml",
        *STUBS,
    },
    "scheduler_svc/core": {"numpy"},
    "scheduler_svc": {
        "common",
        "google",
        "grpc",
        "jinja2",
        "numpy",
        "prometheus_client",
        "structlog",
        "tokenizers",
        *STUBS,
    },
    "executor_svc": {
        "common",
        "flashinfer",
        "gguf",
        "google",
        "grpc",
        "huggingface_hub",
        "numpy",
        "prometheus_client",
        "psutil",
        "safetensors",
        "structlog",
        "tokenizers",
        "torch",
        "transformers",
        "triton",
        *STUBS,
    },
    "common": {
        "google",
        "grpc",
        "grpc_health",
        "grpc_reflection",
        "grpc_status",
        "opentelemetry",
        "prometheus_client",
        "structlog",
        "uvloop",
    },
    "client/paceline": {"google", "grpc"},
    # Run in environments of other servers, where nothing of ours is installed.
    "benchmarks/peers": {
        "benchmarks.BenchmarkError",
        "benchmarks.figures",
        "benchmarks.wanted",
        "benchmarks.workloads",
        "torch",
        "transformers",
        "vllm",
    },
    # What needs a GPU, and runs there from a bare checkout.
    "benchmarks/gpu": {
        "benchmarks",
        "common",
        "executor_svc",
        "grpc",
        "numpy",
        "packaging",
        "paceline",
        "tokenizers",
        "torch",
        "transformers",
        "triton",
    },
    # Scripts are run one at a time and may ask the tests for their servers; no service imports from here.
    "benchmarks": {
        "autoscaler_svc",
        "common",
        "executor_svc",
        "google",
        "grpc",
        "numpy",
        "paceline",
        "psutil",
        "rich",
        "scheduler_svc",
        "tests.observability.otlp_receiver",
        "tests.system",
        "torch",
    },
    "paceline_cli": {
        "autoscaler_svc",
        "benchmarks",
        "common",
        "executor_svc",
        "google",
        "grpc",
        "grpc_health",
        "paceline",
        "rich",
        "scheduler_svc",
        "structlog",
        "typer",
        "yaml",
    },
    "examples": {"paceline"},
}


def python_files(package: str) -> list[Path]:
    inner = [ROOT / other for other in ALLOWED if other.startswith(f"{package}/")]
    files = (path for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name)
    return [path for path in files if not any(folder in path.parents for folder in inner)]


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def is_covered(name: str, allowed: set[str]) -> bool:
    return any(name == known or name.startswith(f"{known}.") for known in allowed)


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_its_place_allows(package):
    """A scheduler without torch, a core without gRPC, services that never import each other: this is what splits."""
    own = package.replace("client/", "").replace("/", ".")
    files = python_files(package)
    forbidden = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported_names(path)
        if not is_covered(name, ALLOWED[package] | {own})
    }

    assert files
    assert not forbidden
