"""The proxy that stands between agent and server passes on what it is not told to change."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.proxy import Proxy


@pytest.fixture
def ends() -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """The proxy, and both ends of a connection through it: its client's and its server's."""
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy() as proxy, contextlib.ExitStack() as stack:
        proxy.target, proxy.recording = server.getsockname(), True
        near = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), 5))
        far = stack.enter_context(server.accept()[0])
        far.settimeout(5)
        yield proxy, near, far


def test_an_end_goes_on_as_one(ends: tuple[Proxy, socket.socket, socket.socket]) -> None:
    proxy, near, far = ends
    near.sendall(b"hello")
    near.shutdown(socket.SHUT_WR)
    assert far.recv(100) == b"hello"
    assert far.recv(100) == b""
    far.sendall(b"bye")
    assert near.recv(100) == b"bye"
    far.close()
    assert _soon(lambda: proxy.recorded == [b"hello"])


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_reset_goes_on_as_one(ends: tuple[Proxy, socket.socket, socket.socket], way: str) -> None:
    proxy, near, far = ends
    near.sendall(b"hello")
    assert far.recv(100) == b"hello"
    this, other = (near, far) if way == "up" else (far, near)
    this.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    this.close()
    with pytest.raises(ConnectionResetError):
        other.recv(100)
    assert _soon(lambda: proxy.recorded == [b"hello"])


def _soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()
