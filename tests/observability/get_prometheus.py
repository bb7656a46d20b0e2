"""Puts `prometheus` and `promtool` where the tests look for them:
`python tests/observability/get_prometheus.py .venv/prometheus`.

They come out of Debian's package, which is unpacked and not installed, so that no rights are needed. Where that fails,
this says why and exits with 1; the tests that need them are skipped then.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "prometheus"
PROGRAMS = ("prometheus", "promtool")
_LONGEST_S = 300


def get_prometheus(target: Path) -> None:
    """Write the programs into the folder `target`. Raises `OSError` or `subprocess.SubprocessError`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt fetches as a user of its own
        try:
            _run("apt-get", "download", PACKAGE, folder=folder)
        except subprocess.CalledProcessError:
            if os.geteuid() != 0:
                raise
            _run("apt-get", "update", folder=folder)  # an image without lists of packages
            _run("apt-get", "download", PACKAGE, folder=folder)
        (package,) = folder.glob("*.deb")
        _run("dpkg-deb", "-x", str(package), "unpacked", folder=folder)
        target.mkdir(parents=True, exist_ok=True)
        for program in PROGRAMS:
            partial = target / f"{program}.part"
            partial.write_bytes((folder / "unpacked/usr/bin" / program).read_bytes())
            partial.chmod(0o755)
            partial.replace(target / program)


def _run(*words: str, folder: Path) -> None:
    subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, timeout=_LONGEST_S)


def main() -> int:
    """The command."""
    target = Path(sys.argv[1])
    try:
        get_prometheus(target)
        for program in PROGRAMS:
            _run(str((target / program).resolve()), "--version", folder=target)
    except FileNotFoundError as error:
        reason = f"{error.filename} is not there"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = str(error)
    else:
        return 0
    for program in PROGRAMS:
        (target / program).unlink(missing_ok=True)
    print(f"No Prometheus, so the tests that need one are skipped: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
