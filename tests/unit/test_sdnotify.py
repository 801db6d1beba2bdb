"""What a service says to its manager, as the manager would hear it."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outrider.sdnotify import Notifier, serving, starting


class Manager:
    """A socket as systemd's; `heard` has every line that came, in order."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)
        self._heard: list[str] = []

    def heard(self) -> list[str]:
        while True:
            try:
                self._heard += self.socket.recv(65536).decode().split("\n")
            except BlockingIOError:
                return self._heard

    def count(self, line: str) -> int:
        return self.heard().count(line)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.socket.close()


async def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)


def test_the_environment_says_where_the_manager_is_and_how_long_it_waits(manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier.from_environment(environ)
    assert notifier.active
    assert notifier.watchdog_s == 2.5
    notifier.ready("all\nis  well")
    notifier.alive()
    notifier.extend(1.5)
    notifier.stopping("bye")
    assert manager.heard() == [
        "READY=1", "STATUS=all is well", "WATCHDOG=1", "EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1", "STATUS=bye",
    ]  # fmt: skip


@pytest.mark.parametrize("extra", [{}, {"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}])
def test_a_watchdog_that_is_not_for_this_process_is_not_fed(manager: Manager, extra: dict[str, str]) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address} | extra)
    assert notifier.watchdog_s == 0
    notifier.alive()
    assert manager.heard() == []


def test_an_abstract_address_is_spoken_to() -> None:
    manager = Manager(f"@outrider-test-{secrets.token_hex(8)}")
    Notifier(manager.address).status("here")
    assert manager.heard() == ["STATUS=here"]
    manager.socket.close()


def test_a_status_is_sent_when_it_changes_and_again_when_it_could_not_be_sent(tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "notify"))
    notifier.status("one")  # nobody is there
    manager = Manager(str(tmp_path / "notify"))
    for text in ("one", "one", "two", "x" * 5000):
        notifier.status(text)
    assert manager.heard() == ["STATUS=one", "STATUS=two", f"STATUS={'x' * 500}"]
    manager.socket.close()


def test_a_manager_that_does_not_read_does_not_hold_the_service_up(manager: Manager) -> None:
    notifier = Notifier(manager.address, watchdog_s=1)
    began = time.monotonic()
    for _ in range(5000):  # a datagram socket's queue has room for a few hundred
        notifier.alive()
    assert time.monotonic() - began < 10
    assert 0 < manager.count("WATCHDOG=1") < 5000


async def test_nothing_is_said_where_no_manager_is() -> None:
    notifier = Notifier.from_environment({"WATCHDOG_USEC": "1000"})
    assert not notifier.active

    def describe() -> str:
        raise AssertionError("nobody asked")

    async with starting(notifier, "starting"), serving(notifier, describe):
        await asyncio.sleep(0.01)


async def test_a_long_start_is_extended_for_as_long_as_the_loop_turns(manager: Manager) -> None:
    async with starting(Notifier(manager.address), "opening the store", step_s=0.02):
        await until(lambda: manager.count("EXTEND_TIMEOUT_USEC=60000") >= 3)
    assert manager.heard()[0] == "STATUS=opening the store"
    said = len(manager.heard())
    await asyncio.sleep(0.1)
    assert len(manager.heard()) == said


async def test_the_watchdog_is_fed_by_the_loop_and_starves_with_it(manager: Manager) -> None:
    lines = iter(("no server", "no server", *(["connected"] * 10_000)))
    async with serving(Notifier(manager.address, watchdog_s=0.1), lambda: next(lines)):
        await until(lambda: manager.count("WATCHDOG=1") >= 4)
        before = manager.count("WATCHDOG=1")
        time.sleep(0.4)  # four times the limit: what hangs says nothing
        assert manager.count("WATCHDOG=1") == before
        await until(lambda: manager.count("WATCHDOG=1") > before)
    heard = manager.heard()
    assert heard[:2] == ["READY=1", "STATUS=no server"]
    assert [line for line in heard if line.startswith("STATUS=")][1:] == ["STATUS=connected", "STATUS=stopping"]
    assert heard[-2:] == ["STOPPING=1", "STATUS=stopping"]
    await asyncio.sleep(0.1)
    assert manager.heard() == heard
