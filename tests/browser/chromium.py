"""A headless Chromium for tests."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

FROM_VENV = Path(sys.prefix) / "chromium/chromium"
_ON_THE_PATH = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start one, or skip the test where there is none."""
    found = [str(FROM_VENV)] if FROM_VENV.exists() else [path for path in map(shutil.which, _ON_THE_PATH) if path]
    if not found:
        pytest.skip(f"no Chromium: neither {FROM_VENV}, which `make test` gets from Debian, nor one on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0])
        yield browser
        browser.close()
