"""What the other ranks do: the same steps as rank 0, in the same order."""

from __future__ import annotations

import queue
import threading
from multiprocessing.connection import Connection

import structlog
import torch

from executor_svc.batch import Failed, Launched, StepBatch
from executor_svc.config import ExecutorConfig
from executor_svc.model import ModelError, choose_device
from executor_svc.ranks.group import RankGroup, config_of_rank, find_meeting
from executor_svc.ranks.messages import Kind, Order, Orders, write_answer
from executor_svc.torch_runner import TorchRunner

log = structlog.get_logger()


def follow(
    rank: int, port: int, config: ExecutorConfig, said: queue.SimpleQueue[bytes], connection: Connection
) -> None:
    """Load this rank's part of the model with the others, and do what rank 0 says for as long as there is one."""
    try:
        own = config_of_rank(config, rank)
        device = choose_device(own.device)
        size = config.tensor_parallel
        group = RankGroup.join(rank, size, device, find_meeting(port, size))
        runner = TorchRunner.load(own, lambda _phase, _share: None, group)
    except Exception as error:
        if not isinstance(error, ModelError):  # which rank 0 tells
            log.exception("this rank's part of the model cannot be loaded")
        connection.send_bytes(write_answer(0, error))
        threading.Event().wait()  # rank 0 ends this process, once it has failed too
    connection.send_bytes(write_answer(0, None))
    orders, follower = Orders(runner.info.slot_count), Follower(runner, connection, device)
    while True:
        follower.obey(orders.read(said.get()))


class Follower:
    """Does what it is told, and answers each order once it is done.

    As in rank 0 a step may be begun while the one before it runs: a second thread waits for their ends.
    """

    def __init__(self, runner: TorchRunner, connection: Connection, device: torch.device) -> None:
        """Start the thread that waits."""
        self._runner = runner
        self._connection = connection
        self._device = device
        self._begun: queue.Queue[tuple[int, Launched]] = queue.Queue()
        threading.Thread(target=self._finish_steps, name="results", daemon=True).start()

    def obey(self, order: Order) -> None:
        """Do it, or begin with it."""
        if order.batch is not None:
            self._begun.put((order.number, self._launch(order.batch)))
            return
        self._begun.join()
        try:
            if order.kind == Kind.CHECK:
                self._runner.check_device()
            elif order.sources is not None and order.destinations is not None:
                self._runner.copy_blocks(order.sources, order.destinations)
        except Exception as error:  # noqa: BLE001  rank 0 decides what it means
            self._answer(order.number, error)
            return
        self._answer(order.number, None)

    def _launch(self, batch: StepBatch) -> Launched:
        try:
            return self._runner.launch(batch)
        except Exception as error:  # noqa: BLE001  rank 0 decides what it means
            return Failed(error)

    def _finish_steps(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own
        while True:
            number, launched = self._begun.get()
            try:
                launched.result()
            except Exception as error:  # noqa: BLE001  rank 0 decides what it means
                self._answer(number, error)
            else:
                self._answer(number, None)
            self._begun.task_done()

    def _answer(self, number: int, error: Exception | None) -> None:
        if error is not None:
            settle(self._device)
        self._connection.send_bytes(write_answer(number, error))


def settle(device: torch.device) -> None:
    """Wait until nothing is left to do for the device.

    A rank that failed alone may have begun a sum that the others never take part in: then this never returns, and rank
    0 ends them all. Else the next sum would be taken for that one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
