"""A house to break, and dice that fall the same way again when they are told to."""

import os
import random
import secrets

import pytest

from tests.chaos.house import House
from tests.end_to_end.conftest import services

__all__ = ["services"]


@pytest.fixture(scope="session")
def chaos_seed():
    """The number that all chance of a run comes from."""
    return int(os.environ.get("PACELINE_CHAOS_SEED") or secrets.randbits(32))


@pytest.fixture
def dice(chaos_seed, request):
    """Chance of one test; a failure can be repeated with the seed that it printed."""
    print(f"to repeat: PACELINE_CHAOS_SEED={chaos_seed}")
    return random.Random(f"{chaos_seed} {request.node.name}")


@pytest.fixture
async def house(services, dice):
    """Processes to be started by the test, and gone after it."""
    async with House(services, dice) as house:
        yield house
