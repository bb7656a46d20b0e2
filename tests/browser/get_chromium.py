"""Puts a headless Chromium where the tests of the status page look for it: `get_chromium.py .venv/chromium`.

It is Debian's, with those of its libraries that this machine lacks, all of it unpacked into that folder: nothing is
installed, and nobody needs to be root. Where that fails, this says why and exits with 1; those tests are skipped then.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "chromium-headless-shell"
_PROGRAM = "usr/lib/chromium/chromium-headless-shell"
_LONGEST_S = 300
_PAGE = "data:text/html,<p>it runs"

_START = """\
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
{fonts}exec "$here/{program}" "$@"
"""
_FONTS = """\
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">usr/share/fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
"""


def get_chromium(target: Path) -> Path:
    """Make the folder `target` and return the program in it. Raises `OSError` or `subprocess.SubprocessError`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="chromium-") as folder:
        packages = _download(Path(folder))
        unpacked = Path(folder) / "unpacked"
        for package in packages:
            _run("dpkg-deb", "--extract", str(package), str(unpacked))
        _write_start(unpacked)
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)
    return target / "chromium"


def _download(folder: Path) -> list[Path]:
    """The package and every missing one that it needs, by lists of packages of our own: those of the system stay."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    own = {
        "Dir::State": folder / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    options = [word for name, value in own.items() for word in ("-o", f"{name}={value}")]
    _run("apt-get", *options, "update")
    _run("apt-get", *options, "install", "--download-only", "--reinstall", "--no-install-recommends", "--yes", PACKAGE)
    return sorted((folder / "cache/archives").glob("*.deb"))


def _write_start(folder: Path) -> None:
    """Write the script that starts the program with the libraries and, where the system has none, the fonts here."""
    libraries = sorted(
        {f"$here/{file.parent.relative_to(folder)}" for file in folder.glob("usr/lib/*-linux-*/**/*.so*")}
    )
    fonts = ""
    if (folder / "etc/fonts/fonts.conf").exists():
        (folder / "fonts.conf").write_text(_FONTS)
        fonts = 'export FONTCONFIG_FILE="$here/fonts.conf"\n'
    start = folder / "chromium"
    start.write_text(_START.format(libraries=":".join(libraries), fonts=fonts, program=_PROGRAM))
    start.chmod(0o755)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=_LONGEST_S)


def main() -> int:
    """The command."""
    target = Path(sys.argv[1]).absolute()
    try:
        program = get_chromium(target)
        _run(str(program), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", _PAGE)
    except FileNotFoundError as error:
        reason = f"{error.filename} is not there"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    else:
        return 0
    shutil.rmtree(target, ignore_errors=True)
    reason = re.sub(r"\S+://\S+", "(a package server)", reason)
    print(f"No Chromium, so the tests of the status page are skipped: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
