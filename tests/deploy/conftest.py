"""Real processes for what is deployed."""

from tests.end_to_end.conftest import services

__all__ = ["services"]
