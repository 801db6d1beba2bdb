"""A journal on a disk without a byte to spare: it goes on with the room that it held, then waits, and loses nothing."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_core.journal import RESERVE_BYTES, Journal
from agent_core.outbox import Outbox
from agent_core.state import State, migrations
from agent_core.transitions import Transition
from outrider.v1 import node_service_pb2 as pb
from tests.small_disk import fill, small_disk

NOTED, KEPT = Transition.EVENT_NOTED, Transition.SESSION_KEPT


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 64) as mount:
        yield mount


def report(number: int, size: int = 500) -> pb.RunReport:
    return pb.RunReport(run_id=f"r{number}", lease_id="x" * size)


async def test_what_the_agent_must_remember_is_written_to_a_full_disk(disk: Path) -> None:
    journal = Journal(disk / "state" / "journal.db", migrations(), reserve_bytes=RESERVE_BYTES)
    outbox, state = Outbox(journal), State(journal)
    fill(disk)
    for number in range(1000):
        await asyncio.wait_for(state.commit(NOTED, outbox.run_report(report(number))), 10)
    assert not journal.blocked
    assert (disk / "state" / "reserve.bin").exists(), "the journal's own files had room enough"
    journal.close()
    again = Journal(disk / "state" / "journal.db", migrations(), reserve_bytes=RESERVE_BYTES)
    assert Outbox(again).depth == 1000
    again.close()


async def test_a_write_that_finds_no_room_at_all_waits_for_it_and_is_done_once(disk: Path) -> None:
    journal = Journal(disk / "journal.db", migrations(), reserve_bytes=1024**2)
    outbox, state = Outbox(journal), State(journal)
    hog = fill(disk)
    writes: list[asyncio.Task[None]] = []
    async with asyncio.timeout(30):
        while not journal.blocked:
            # The first ones take the room that was held, also the reserve's; something else takes what that gave back.
            writes.append(asyncio.create_task(state.commit(NOTED, outbox.run_report(report(len(writes), 200_000)))))
            await asyncio.wait(writes, timeout=0.02)
            fill(disk)
    assert "can't be written" in journal.blocked
    assert not writes[-1].done()
    assert journal.query_now("SELECT count(*) FROM outbox")[0][0] < len(writes), "reading goes on"
    hog.unlink()
    async with asyncio.timeout(20):
        await asyncio.gather(*writes)
    assert not journal.blocked
    assert outbox.depth == len(writes)
    assert [item.run_id for item in outbox.read(("run_report",))] == [f"r{n}" for n in range(len(writes))]
    journal.close()


async def test_a_journal_that_waits_for_room_can_be_closed(disk: Path) -> None:
    journal = Journal(disk / "journal.db", migrations())
    outbox, state = Outbox(journal), State(journal)
    fill(disk)
    writes = [asyncio.create_task(state.commit(NOTED, outbox.run_report(report(n, 100_000)))) for n in range(200)]
    async with asyncio.timeout(20):
        while not journal.blocked:
            await asyncio.sleep(0.01)
    await asyncio.wait_for(asyncio.to_thread(journal.close), 10)
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert any(isinstance(each, sqlite3.Error) for each in results), "whoever waited is told"


async def test_the_room_is_held_again_once_the_disk_has_some(disk: Path) -> None:
    journal = Journal(disk / "journal.db", migrations(), reserve_bytes=1024**2)
    reserve = disk / "reserve.bin"
    assert reserve.stat().st_size == 2 * 1024**2
    hog = fill(disk)
    writes = [journal.execute(KEPT, "INSERT INTO meta VALUES (?, ?)", (str(n), "x" * 100_000)) for n in range(25)]
    await asyncio.wait_for(asyncio.gather(*writes), 20)
    assert not reserve.exists()
    hog.unlink()
    journal.keep_room()
    async with asyncio.timeout(10):
        while not reserve.exists():
            await asyncio.sleep(0.01)
    journal.close()


async def test_a_journal_is_opened_on_a_full_disk(disk: Path) -> None:
    journal = Journal(disk / "journal.db", migrations(), reserve_bytes=RESERVE_BYTES)
    await journal.execute(KEPT, "INSERT INTO meta VALUES ('a', 'b')")
    journal.close()
    fill(disk)
    again = Journal(disk / "journal.db", migrations(), reserve_bytes=RESERVE_BYTES)
    assert again.query_now("SELECT value FROM meta WHERE key = 'a'")[0][0] == "b"
    await asyncio.wait_for(again.execute(KEPT, "INSERT INTO meta VALUES ('c', 'd')"), 10)
    again.close()
