"""One part of the check, in a process of its own: a kernel that breaks the device breaks nothing else.

    python -m benchmarks.gpu.part '{"part": …, "given": …, "rows": FILE}'

It imports what it needs, and begins when a line comes on standard input: importing torch takes seconds, in which the
part before can still run.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.given import Given, Row

MODULES = {
    "setting": "benchmarks.gpu.where",
    "ceilings": "benchmarks.gpu.ceilings",
    "kernels": "benchmarks.gpu.kernel_rows",
    "kernel speed": "benchmarks.gpu.kernel_speed",
    "models": "benchmarks.gpu.models",
    "transformers": "benchmarks.gpu.peers",
    "tests": "benchmarks.gpu.gpu_tests",
}
_IMPORTED_LATE = {"models": "executor_svc.torch_runner", "transformers": "transformers"}  # by what the modules call


def main() -> None:
    """Run the part that the arguments name, and write its rows as they come."""
    wanted = json.loads(sys.argv[1])
    path = Path(wanted["rows"])

    def tell(row: Row) -> None:
        with path.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps({"part": wanted["part"], **row}) + "\n")

    try:
        module = importlib.import_module(MODULES[wanted["part"]])
        if wanted["part"] in _IMPORTED_LATE:
            importlib.import_module(_IMPORTED_LATE[wanted["part"]])
        if not sys.stdin.readline():
            return  # nobody wants it any more
        module.run(Given(**wanted["given"] | {"folder": Path(wanted["given"]["folder"])}), tell)
    except Exception as error:  # noqa: BLE001  it is a row like any other; the other parts go on
        traceback.print_exc()
        reason = str(error).strip() or "no reason given"
        tell({"model": wanted["given"]["shape"], "failure": f"{type(error).__name__}: {reason}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
