"""Addresses: where servers listen, and under which address others reach them."""

from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common.grpc_servers import AddressError, Server, bind, check_host_port, reachable
from common.http_pages import HttpPages
from common.processes import ANY_PORT


@pytest.mark.parametrize(
    ("address", "peer", "told"),
    [
        ("127.0.0.1:7", "10.0.0.1:1", "127.0.0.1:7"),
        ("0.0.0.0:7", "127.0.0.1:1", "127.0.0.1:7"),
        ("0.0.0.0:7", "localhost:1", "127.0.0.1:7"),
        ("[::]:7", "unix:/run/s.sock", "127.0.0.1:7"),
        ("gpu-1:7", "scheduler:1", "gpu-1:7"),
        ("unix:/run/e.sock", "unix:/run/s.sock", "unix:/run/e.sock"),
    ],
)
def test_tells_the_peer_an_address_that_it_can_reach(address, peer, told):
    """The scheduler dials what the executor says; on one machine that needs no setting."""
    assert reachable(address, peer) == told


def test_asks_for_an_address_where_it_cannot_be_told():
    """127.0.0.1 would send a scheduler on another machine to itself, for ever and without a word."""
    with pytest.raises(AddressError, match="say which with --advertise HOST:7"):
        reachable("0.0.0.0:7", "scheduler:50051")


@pytest.mark.parametrize("address", ["nowhere", "host:", ":", "host:port", "host:65536", ""])
def test_refuses_what_is_no_address(address):
    """gRPC's own message for these speaks of name resolution."""
    with pytest.raises(AddressError, match="is not an address: give host:port"):
        check_host_port(address)


async def test_a_second_server_on_an_address_is_refused(tmp_path):
    """gRPC would share the port, or take the socket away, and half of the requests would go to the wrong server."""
    server = Server()
    socket = f"unix:{tmp_path}/s.sock"
    tcp, _ = await server.start(["127.0.0.1:0", socket], [])
    other = grpc.aio.server(options=[("grpc.so_reuseport", 0)])

    for address in (tcp, socket):
        with pytest.raises(AddressError, match="in use"):
            bind(other, address)
    await server.stop()


async def test_a_socket_that_a_dead_process_left_is_taken(tmp_path):
    """After a kill the file is still there; a restart at the same address must work."""
    import socket as sockets

    path = tmp_path / "s.sock"
    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(path))
    server = Server()

    assert await server.start([f"unix:{path}"], []) == [f"unix:{path}"]
    await server.stop()


def test_metrics_are_served_as_they_are_when_asked():
    """A scrape that shows yesterday's numbers is worse than none; a port that is taken must be named."""
    now = {"reading": 1.0}

    class Reading(Collector):
        def collect(self):
            yield GaugeMetricFamily("reading", "Now.", now["reading"])

    pages = HttpPages([Reading()])
    port = pages.start(ANY_PORT, "127.0.0.1")
    texts = []
    for now["reading"] in (2.0, 3.0):
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            texts.append(answer.read().decode())

    assert ["reading 2.0\n" in texts[0], "reading 3.0\n" in texts[1]] == [True, True]
    with pytest.raises(AddressError, match=f"cannot serve HTTP on 127.0.0.1:{port}: .* in use; choose another"):
        HttpPages([]).start(port, "127.0.0.1")
    pages.stop()
