#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes: see --help and benchmarks/README.md.
#
#   PYTHON=python3.12    the interpreter; else .venv's, else python3
#   WHEELS=FOLDER        wheels of packages that this interpreter does not have
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH="$root:$root/client${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.gpu "$@"
