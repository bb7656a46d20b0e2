"""Since when requests wait for an executor."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler_svc.core.request import Request, RequestState


class WaitingTimes:
    """Since when each choice waits whom no executor computes: its acceptance, or when it left its last executor.

    Who is placed is kept and looked past, so that placing costs nothing.
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._since: dict[Request, float] = {}  # of every choice that has not ended

    def note(self, choices: Iterable[Request], now: float) -> None:
        """These wait from now on, but for those that have ended."""
        self._since.update((choice, now) for choice in choices if choice.state is not RequestState.FINISHED)

    def forget(self, choice: Request) -> None:
        """It has ended."""
        self._since.pop(choice, None)

    def oldest(self) -> float | None:
        """Since when the one waits that waits longest; None: nobody does. May be asked from another thread."""
        everybody = list(self._since.items())
        return min((_began(choice, since) for choice, since in everybody if _is_waiting(choice)), default=None)


def _is_waiting(choice: Request) -> bool:
    return choice.state is RequestState.WAITING and not choice.is_unforked


def _began(choice: Request, since: float) -> float:
    """When a wait began. A choice that found no room when it was forked has not waited for an executor before its
    first one was placed, which is as near as can be told.
    """
    first_placed_at = choice.family[0].placed_at
    return since if not choice.choice or first_placed_at is None else max(since, first_placed_at)
