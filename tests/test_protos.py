"""The proto files: the checked-in stubs are what they say, and they still speak with the last release."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(os.environ.get("PACELINE_PROTOS_PYTHON", ROOT / ".venv/protos/bin/python"))
BUF = Path(sys.executable).parent / "buf"
INTERNAL, USERS = "paceline/internal/v1/executor.proto", "paceline/v1/inference.proto"


def stubs(folder: Path) -> dict[str, str]:
    paths = [path for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in sorted(folder.rglob(pattern))]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def test_stubs_are_what_the_protos_say(tmp_path):
    """A stub that lags behind its proto lies to every user of it; `make protos` mends it."""
    if not TOOLS.exists():
        pytest.fail(f"the code generator is not at {TOOLS}; run the tests with `make test`, which sets it up")
    subprocess.run([TOOLS, ROOT / "protos/generate.py", tmp_path], check=True, capture_output=True)

    generated = stubs(tmp_path)
    assert len(generated) == 28
    assert generated == stubs(ROOT / "client")


@pytest.mark.parametrize("path", sorted((ROOT / "protos").rglob("*.proto")), ids=lambda path: path.name)
def test_every_rpc_lists_its_errors_or_its_service_does(path):
    """The protos are the documentation of the system: a caller learns there what to do about an error."""
    text = path.read_text()

    if "service " in text:
        assert "Errors" in text
    assert "TODO" not in text


def findings(folder: Path, *changes: tuple[str, str, str]) -> str:
    """What `buf breaking` says of the proto files, copied to `folder` and changed there: (file, old, new) each."""
    shutil.copytree(ROOT / "protos", folder, dirs_exist_ok=True)
    for file, old, new in changes:
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
        (folder / file).write_text(text.replace(old, new))
    (baseline,) = (ROOT / "protos/baseline").glob("*.binpb")
    done = subprocess.run([BUF, "breaking", folder, "--against", baseline], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    assert bool(done.returncode) == bool(done.stdout)
    return done.stdout


def test_protos_still_speak_with_the_last_release(tmp_path):
    """During a rolling restart two releases talk to each other, and clients stay at an old one for years."""
    assert not findings(tmp_path)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (
            (INTERNAL, "uint32 sampling_row_count = 14;", "string sampling_row_count = 14;"),
            'Field "14" with name "sampling_row_count" on message "Plan" changed type from "uint32" to "string"',
        ),
        (
            (INTERNAL, "uint32 sampling_row_count = 14;", ""),
            '"sampling_row_count" on message "Plan" was deleted without reserving the number "14"',
        ),
        (
            (INTERNAL, "rpc Attach(", "rpc Connect("),
            'RPC "Attach" on service "ExecutorService" was deleted',
        ),
        (
            (USERS, "uint32 prompt_token_count = 2;", "uint32 prompt_tokens = 2;"),
            'Field "2" on message "GenerateResponse" changed name from "prompt_token_count" to "prompt_tokens"',
        ),
        (
            (USERS, "uint32 prompt_token_count = 2;", "reserved 2;"),
            'field "2" with name "prompt_token_count" on message "GenerateResponse" was deleted.',
        ),
    ],
    ids=[
        "number-used-again",
        "number-not-reserved",
        "internal-rpc-renamed",
        "user-field-renamed",
        "user-field-removed",
    ],
)
def test_what_the_last_release_would_misread_is_caught(tmp_path, change, finding):
    """Bytes that mean something else to the other side are the quietest way to break a fleet."""
    assert finding in findings(tmp_path, change)


def test_the_internal_contract_may_grow_and_retire_fields(tmp_path):
    """A guard that forbids what is harmless gets switched off: one side skips what the other does not know."""
    retired = (INTERNAL, "uint32 sampling_row_count = 14;", "reserved 14;\n\n  uint32 draft_count = 9999;")
    renamed = (INTERNAL, "repeated SlotError errors = 3;", "repeated SlotError failures = 3;")

    assert not findings(tmp_path, retired, renamed)
