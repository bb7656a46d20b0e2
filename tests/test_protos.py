"""The checked-in stubs are what the proto files say, made with the oldest toolchain that we support."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(os.environ.get("PACELINE_PROTOS_PYTHON", ROOT / ".venv/protos/bin/python"))


def stubs(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*_pb2*.py*"))}


def test_stubs_are_what_the_protos_say(tmp_path):
    """A stub that lags behind its proto lies to every user of it; `make protos` mends it."""
    if not TOOLS.exists():
        pytest.fail(f"the code generator is not at {TOOLS}; run the tests with `make test`, which sets it up")
    subprocess.run([TOOLS, ROOT / "protos/generate.py", tmp_path], check=True, capture_output=True)

    generated = stubs(tmp_path)
    assert len(generated) == 16
    assert generated == {name: text for name, text in stubs(ROOT / "client").items() if "__pycache__" not in name}


@pytest.mark.parametrize("path", sorted((ROOT / "protos").rglob("*.proto")), ids=lambda path: path.name)
def test_every_rpc_lists_its_errors_or_its_service_does(path):
    """The protos are the documentation of the system: a caller learns there what to do about an error."""
    text = path.read_text()

    if "service " in text:
        assert "Errors" in text
    assert "TODO" not in text
