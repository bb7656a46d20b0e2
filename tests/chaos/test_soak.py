"""The short form of the soak; the long one is `make soak`."""

import asyncio
import shutil
import tempfile
from pathlib import Path

from tests.chaos.soak import Settings, soak


async def test_nobody_can_tell_that_everything_was_broken_all_the_time(chaos_seed):
    """Failures do not come one by one: the next happens before the last is mended."""
    folder = Path(tempfile.mkdtemp(prefix="paceline-"))  # a socket's path has at most 107 bytes
    try:
        report = await soak(Settings(request_count=100, client_count=12, seed=chaos_seed), folder)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder)
    print(report)

    assert report.is_clean, report
    assert sum(report.deeds.values()) > 3
