"""What a rank does before anything else: see to it that it ends when rank 0 ends, however that goes.

Nothing here needs torch, which takes seconds to import.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


def end_with_rank_0(connection: Connection) -> queue.SimpleQueue[bytes]:
    """From now on end this process once rank 0 is gone; returns what rank 0 says, in order."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may be sent to all processes; rank 0 drains and then ends all
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # ends a process that is stopped, or stuck in a device, too
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, said), name="rank-0", daemon=True).start()
    return said


def _listen(connection: Connection, said: queue.SimpleQueue[bytes]) -> None:
    """Take in what rank 0 says until its end of the line is closed, which the system does if nobody else."""
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # the main thread may wait for a rank that is gone
        said.put(message)
