"""Generates the Python stubs of every proto file into a folder: `python protos/generate.py client`.

Runs in the environment of `requirements-protos.txt`, which `make protos` sets up.
"""

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).parent


def generate(target: Path) -> None:
    """Write messages, services and their types for all proto files below `target`, and make it importable."""
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy")]
    scripts = Path(sys.executable).parent  # the plugins stand beside the interpreter, which may not be on PATH
    plugins = [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    includes = [f"-I{PROTOS}", f"-I{well_known}"]
    failed = protoc.main(["protoc", *includes, *plugins, *outputs, f"--mypy_grpc_out={target}", *files])
    if failed:
        raise SystemExit(f"protoc failed with exit code {failed}; its message is above")
    for file in files:
        for folder in list(Path(file).parents)[:-1]:
            if str(folder) != "paceline":  # the SDK's own package has more to say
                (target / folder / "__init__.py").touch()


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve())
