"""Logs of steps while the node's disk is full: never a byte in the wrong place, and what is missing is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent_core.journal import RESERVE_BYTES, Journal
from agent_core.runtimes.base import StreamName
from agent_core.spool import Spool
from agent_core.state import State, migrations
from agent_core.steplog import Chunks, StepLog
from agent_core.transitions import Transition
from outrider.errors import NotFound
from tests.small_disk import fill, small_disk

Items = list[tuple[StreamName, bytes]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 64) as mount:
        yield mount


@pytest.fixture
def journal(disk: Path) -> Iterator[Journal]:
    journal = Journal(disk / "journal.db", migrations(), reserve_bytes=RESERVE_BYTES)
    yield journal
    journal.close()


async def chunks(items: Items) -> AsyncIterator[tuple[StreamName, bytes]]:
    for item in items:
        yield item


async def nothing() -> Chunks:
    raise NotFound("somebody removed the container")
    yield


OUTPUT: Items = [("stdout", bytes([65 + n]) * 10_000) for n in range(20)]
WHOLE = b"".join(data for _, data in OUTPUT)


async def written_on_a_full_disk(disk: Path, journal: Journal) -> tuple[Spool, StepLog, Path]:
    """A log of which the beginning was written before the disk was full, and the rest was refused."""
    spool = Spool(disk / "spool", journal)
    log = StepLog(spool, await spool.open("r1", "a", 1), [], max_bytes=10**6, on_limit=lambda: None)

    async def output() -> AsyncIterator[tuple[StreamName, bytes]]:
        for number, item in enumerate(OUTPUT):
            if number == 5:
                await spool.flush()
                fill(disk)
            yield item

    await log.pump(output())
    await spool.flush()
    return spool, log, disk / "hog"


async def test_a_log_that_the_disk_refused_is_completed_from_the_engines_once_there_is_room(
    disk: Path, journal: Journal
) -> None:
    spool, log, hog = await written_on_a_full_disk(disk, journal)
    out = (await spool.open("r1", "a", 1))["stdout"]
    assert out.broken
    hog.unlink()
    await State(journal).commit(Transition.EVENT_NOTED, *await log.finish(True, lambda: chunks(OUTPUT)))
    assert spool.read(out, 0, 10**6) == WHOLE
    assert (out.length, out.gap) == (len(WHOLE), 0)
    spool.close()


@pytest.mark.parametrize("source", [lambda: chunks(OUTPUT), nothing])
async def test_a_log_that_finds_no_room_says_how_much_of_it_is_missing(
    disk: Path, journal: Journal, source: object
) -> None:
    spool, log, _hog = await written_on_a_full_disk(disk, journal)
    out = (await spool.open("r1", "a", 1))["stdout"]
    await State(journal).commit(Transition.EVENT_NOTED, *await log.finish(True, source))  # type: ignore[arg-type]
    kept = spool.read(out, 0, 10**6)
    assert 50_000 <= len(kept) < len(WHOLE)
    assert kept == WHOLE[: len(kept)]
    assert (out.length, out.gap) == (len(WHOLE), len(WHOLE) - len(kept))
    spool.close()
    row = journal.query_now("SELECT length, gap FROM logs WHERE stream = 'stdout'")[0]
    assert tuple(row) == (out.length, out.gap), "and it is told by the next agent, too"
