"""A line between a client and a server that a test can cut, or let fall silent."""

import socket
import struct
import threading
from contextlib import suppress

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Line:
    """Forwards TCP connections to `target`, until something happens to them.

    One that comes while nobody listens there is taken and closed, as port forwarders do, or left `hanging`.
    """

    def __init__(self, target: str, *, hanging: bool = False) -> None:
        self._server = target.rpartition(":")[0], int(target.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._hanging = hanging
        self._ends: list[socket.socket] = []  # two for each connection, one where the server was away
        self._silent: set[socket.socket] = set()  # what comes out of these goes nowhere
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset the connections of now, as a router does that lost its state."""
        while self._ends:
            end = self._ends.pop()
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            with suppress(OSError):  # one side has gone already
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
            end.close()

    def fall_silent(self) -> None:
        """Lose whatever the connections of now carry from here on, without a word to either side."""
        self._silent.update(self._ends)

    def close(self) -> None:
        """Cut everything, and take no new connection."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._server)
                except OSError:  # the server is away
                    if self._hanging:
                        self._ends.append(near)
                    else:
                        near.close()
                    continue
                self._ends += near, far
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # cut
            while data := source.recv(65_536):
                if source not in self._silent:
                    sink.sendall(data)
