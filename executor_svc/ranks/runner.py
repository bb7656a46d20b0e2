"""The runner of a model that several GPUs share: rank 0's part of it, and the others do everything alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count

from executor_svc.batch import Failed, IntArray, Launched, StepBatch, StepOutput
from executor_svc.config import ExecutorConfig
from executor_svc.model import choose_device
from executor_svc.ranks.follower import settle
from executor_svc.ranks.group import RankGroup, check_shared, config_of_rank, open_meeting
from executor_svc.ranks.messages import Kind, Order, Orders
from executor_svc.ranks.processes import Ranks
from executor_svc.start_times import Progress
from executor_svc.torch_runner import TorchRunner


class RankedRunner:
    """An `AheadRunner`. Each rank samples for itself, from the same logits with the same result; rank 0's is told."""

    def __init__(self, runner: TorchRunner, ranks: Ranks, group: RankGroup) -> None:
        """Put the parts together, all of which have loaded the model."""
        self._runner = runner
        self._ranks = ranks
        self._group = group
        self._orders = Orders(runner.info.slot_count)
        self._numbers = count(1)
        self.info = replace(runner.info, cache_bytes=group.size * runner.info.cache_bytes, device_count=group.size)

    @classmethod
    def load(cls, config: ExecutorConfig, progress: Progress, start: Callable[[int], Ranks] = Ranks) -> RankedRunner:
        """Start the other ranks, and load the model with them.

        Raises:
            ModelError: the model, the settings or the machine do not allow it; the message says what to change.
        """
        check_shared(config)
        progress("starting the ranks", 0.0)
        ranks = start(config.tensor_parallel)
        with _closing_unless_done(ranks):
            runner, group = _load_alike(config, progress, ranks)
        return cls(runner, ranks, group)

    def launch(self, batch: StepBatch) -> Launched:
        """Begin a step everywhere."""
        with self._ranks.waiting():
            number = self._tell(Kind.STEP, batch=batch)
            launched = self._launch(batch)
        return _RankedStep(launched, lambda error: self._agree(number, error), self._ranks)

    def run(self, batch: StepBatch) -> StepOutput:
        """Compute a step everywhere. Raises what every rank has raised."""
        return self.launch(batch).result()

    def check_device(self) -> None:
        """Compute something that cannot fail, everywhere."""
        self._do(Kind.CHECK, self._runner.check_device)

    def copy_blocks(self, sources: IntArray, destinations: IntArray) -> None:
        """Copy whole blocks everywhere: every source is read before any destination is written."""
        self._do(Kind.COPY, lambda: self._runner.copy_blocks(sources, destinations), sources, destinations)

    def close(self) -> None:
        """End the other ranks; nothing can be run any more."""
        self._ranks.close()
        self._group.leave()

    def _launch(self, batch: StepBatch) -> Launched:
        try:
            return self._runner.launch(batch)
        except Exception as error:  # noqa: BLE001  it is told when the others have ended, too
            return Failed(error)

    def _tell(
        self,
        kind: Kind,
        batch: StepBatch | None = None,
        sources: IntArray | None = None,
        destinations: IntArray | None = None,
    ) -> int:
        number = next(self._numbers)
        self._ranks.tell(self._orders.write(Order(number, kind, batch, sources, destinations)))
        return number

    def _do(self, kind: Kind, act: Callable[[], None], *blocks: IntArray) -> None:
        error: Exception | None = None
        with self._ranks.waiting():
            number = self._tell(kind, None, *blocks)
            try:
                act()
            except Exception as caught:  # noqa: BLE001  it is raised once the others have answered
                error = caught
        self._agree(number, error)
        if error is not None:
            raise error

    def _agree(self, number: int, error: Exception | None) -> None:
        if error is not None:
            with self._ranks.waiting():
                settle(self._group.device)
        self._ranks.agree(number, error)


@contextmanager
def _closing_unless_done(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except BaseException:
        ranks.close()
        raise


def _load_alike(config: ExecutorConfig, progress: Progress, ranks: Ranks) -> tuple[TorchRunner, RankGroup]:
    """Load this rank's part of the model while the others load theirs. Raises what all of them have raised."""
    size = config.tensor_parallel
    with ranks.waiting(math.inf):
        try:
            meeting = open_meeting(size)
            ranks.introduce({"port": meeting.port, "config": asdict(config)})
            own = config_of_rank(config, 0)
            group = RankGroup.join(0, size, choose_device(own.device), meeting)
            loaded = TorchRunner.load(own, progress, group), group
        except Exception as error:
            ranks.agree(0, error)
            raise
    ranks.agree(0, None)
    return loaded


class _RankedStep:
    """A step on its way everywhere."""

    def __init__(self, own: Launched, agree: Callable[[Exception | None], None], ranks: Ranks) -> None:
        self._own = own
        self._agree = agree
        self._ranks = ranks
        self._outcome: StepOutput | Exception | None = None

    @property
    def keeps_tokens(self) -> bool:
        return self._own.keeps_tokens

    def wait(self) -> None:
        if self._outcome is not None:
            return
        outcome: StepOutput | Exception
        with self._ranks.waiting():
            try:
                outcome = self._own.result()
            except Exception as error:  # noqa: BLE001  it is raised by `result`
                outcome = error
        self._agree(outcome if isinstance(outcome, Exception) else None)
        self._outcome = outcome

    def result(self) -> StepOutput:
        self.wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome
