"""The log spool and the outbox: nothing lost, nothing twice, nobody blocked."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_core.journal import Journal
from agent_core.outbox import MAX_EVENTS, Outbox
from agent_core.runtimes.base import StreamName
from agent_core.spool import LogKey, Spool
from agent_core.state import State, migrations
from agent_core.steplog import Chunks, StepLog
from agent_core.transitions import Transition
from outrider.errors import NotFound
from outrider.v1 import node_service_pb2 as pb


@pytest.fixture
def journal(tmp_path: Path) -> object:
    journal = Journal(tmp_path / "journal.db", migrations())
    yield journal
    journal.close()


async def chunks(*items: tuple[StreamName, bytes]) -> AsyncIterator[tuple[StreamName, bytes]]:
    for item in items:
        yield item


async def nothing() -> Chunks:
    raise AssertionError("the engine's log was asked for")
    yield


async def finish(log: StepLog, journal: Journal, ended: bool, source: object = nothing) -> None:
    await State(journal).commit(Transition.ATTEMPT_SETTLED, *await log.finish(ended, source))  # type: ignore[arg-type]


async def test_a_log_survives_the_agent_and_goes_when_it_is_acknowledged(tmp_path: Path, journal: Journal) -> None:
    spool = Spool(tmp_path / "spool", journal)
    files = await spool.open("r1", "a", 1)
    log = StepLog(spool, files, [], max_bytes=1000, on_limit=lambda: None)
    await log.pump(chunks(("stdout", b"hello "), ("stderr", b"!"), ("stdout", b"world")))
    await finish(log, journal, True)
    spool.close()
    again = Spool(tmp_path / "spool", journal)
    out = next(each for each in again.pending() if each.key.stream == "stdout")
    assert again.read(out, 0, 100) == b"hello world"
    assert out.length == 11
    await again.acknowledge(LogKey("r1", "a", 1, "stdout"), 5)
    again.rewind()
    assert again.read(out, out.sent, 100) == b" world"
    await again.acknowledge(LogKey("r1", "a", 1, "stdout"), 11)
    await again.acknowledge(LogKey("r1", "a", 1, "stderr"), 1)
    assert not again.pending()
    assert not list((tmp_path / "spool").iterdir())
    assert not await journal.query("SELECT * FROM logs")
    again.close()


async def test_what_an_agent_left_that_was_killed_while_it_made_a_logs_directory_goes_with_the_log(
    tmp_path: Path, journal: Journal
) -> None:
    spool = Spool(tmp_path / "spool", journal)
    await spool.open("r1", "a", 1)
    (tmp_path / "spool" / "r1").mkdir()
    await State(journal).commit(Transition.RUN_GIVEN_UP, *spool.abandon("r1"))
    for log in spool.pending():
        log.gap_sent = True
        await spool.acknowledge(log.key, 0)
    assert not await journal.query("SELECT * FROM logs")
    assert not list((tmp_path / "spool").iterdir())
    spool.close()


async def test_what_the_server_has_not_acknowledged_is_owed_bytes_and_gaps_alike(
    tmp_path: Path, journal: Journal
) -> None:
    spool = Spool(tmp_path / "spool", journal, max_bytes=5)
    files = await spool.open("r1", "a", 1)
    assert spool.owed_bytes == 0
    assert spool.append(files["stdout"], b"hello")
    assert spool.owed_bytes == 5
    await spool.flush()
    await State(journal).commit(
        Transition.ATTEMPT_SETTLED, spool.finished(files["stdout"], gap=6), spool.finished(files["stderr"], gap=-1)
    )
    assert spool.owed_bytes == 6
    await spool.acknowledge(files["stdout"].key, 5)
    assert spool.owed_bytes == 2  # a gap in each is to be told yet
    await spool.acknowledge(files["stdout"].key, 11)
    assert spool.owed_bytes == 1
    spool.set_aside("r1")  # the server has no such run
    assert spool.owed_bytes == 0
    spool.close()


async def test_a_restarted_reader_adds_only_what_is_missing(tmp_path: Path, journal: Journal) -> None:
    spool = Spool(tmp_path / "spool", journal)
    files = await spool.open("r1", "a", 1)
    secret = "s3cret-value"
    first = StepLog(spool, files, [secret], max_bytes=1000, on_limit=lambda: None)
    await first.pump(chunks(("stdout", b"key s3cret-va")))
    await spool.flush()
    second = StepLog(spool, files, [secret], max_bytes=1000, on_limit=lambda: None)
    whole = chunks(("stdout", b"key s3cret-value and more\n"))
    await finish(second, journal, False, lambda: whole)
    kept = spool.read(files["stdout"], 0, 100)
    assert b"and more\n" in kept
    assert b"value" not in kept
    spool.close()


async def test_a_full_spool_never_waits_and_says_how_much_is_missing(tmp_path: Path, journal: Journal) -> None:
    spool = Spool(tmp_path / "spool", journal, max_bytes=100)
    files = await spool.open("r1", "a", 1)
    log = StepLog(spool, files, [], max_bytes=10_000, on_limit=lambda: None)
    whole = [("stdout", b"x" * 60), ("stdout", b"y" * 60), ("stdout", b"z" * 30)]
    await log.pump(chunks(*whole))  # type: ignore[arg-type]
    await finish(log, journal, True, lambda: chunks(*whole))  # type: ignore[arg-type]
    assert spool.read(files["stdout"], 0, 1000) == b"x" * 60
    assert (files["stdout"].length, files["stdout"].gap) == (150, 90)
    spool.close()


async def test_a_log_that_nobody_has_any_more_has_a_gap_of_unknown_size(tmp_path: Path, journal: Journal) -> None:
    async def gone() -> Chunks:
        raise NotFound("no such container")
        yield

    spool = Spool(tmp_path / "spool", journal)
    files = await spool.open("r1", "a", 1)
    log = StepLog(spool, files, [], max_bytes=100, on_limit=lambda: None)
    await finish(log, journal, False, gone)
    assert files["stdout"].gap == -1
    assert files["stdout"] in spool.pending()
    spool.close()


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=8), have=st.integers(0, 300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
async def test_any_interruption_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int], have: int
) -> None:
    root = tmp_path_factory.mktemp("spool")
    journal = Journal(root / "journal.db", migrations())
    spool = Spool(root / "spool", journal)
    files = await spool.open("r", "s", 1)
    edges = sorted({0, *[cut for cut in cuts if cut < len(data)], len(data)})
    pieces: list[tuple[StreamName, bytes]] = [("stdout", data[a:b]) for a, b in itertools.pairwise(edges)]
    first = StepLog(spool, files, [], max_bytes=10_000, on_limit=lambda: None)
    await first.pump(chunks(("stdout", data[:have])))
    second = StepLog(spool, files, [], max_bytes=10_000, on_limit=lambda: None)
    await finish(second, journal, False, lambda: chunks(*pieces))
    assert (files["stdout"].path.read_bytes() if data and files["stdout"].path.exists() else b"") == data
    spool.close()
    journal.close()


async def test_the_outbox_keeps_everything_until_it_is_acknowledged(tmp_path: Path, journal: Journal) -> None:
    outbox, state = Outbox(journal), State(journal)
    for number in range(3):
        await state.commit(Transition.STEP_WAITING, outbox.run_report(pb.RunReport(run_id=f"r{number}")))
    await outbox.emit("a.b", "c", {"x": 1})
    assert outbox.depth == 4
    first, second, third = outbox.read(("run_report",))
    assert first.sequence < second.sequence < third.sequence
    await outbox.acknowledge([second.sequence])
    assert [item.run_id for item in outbox.read(("run_report", "write_back"))] == ["r0", "r2"]
    assert Outbox(journal).depth == outbox.depth == 3
    await outbox.acknowledge_events(10_000)
    assert [item.kind for item in outbox.read(("run_report", "event"))] == ["run_report", "run_report"]


async def test_numbers_are_never_used_again(tmp_path: Path, journal: Journal) -> None:
    outbox, state = Outbox(journal), State(journal)
    await state.commit(Transition.STEP_WAITING, outbox.run_report(pb.RunReport(run_id="r")))
    (item,) = outbox.read(("run_report",))
    await outbox.acknowledge([item.sequence])
    await state.commit(Transition.STEP_WAITING, outbox.run_report(pb.RunReport(run_id="r")))
    assert outbox.read(("run_report",))[0].sequence > item.sequence


async def test_events_are_bounded_and_reports_are_not(journal: Journal) -> None:
    outbox, state = Outbox(journal), State(journal)
    await state.commit(Transition.STEP_WAITING, outbox.run_report(pb.RunReport(run_id="r")))
    await state.commit(
        Transition.EVENT_NOTED, *(outbox.event("a.b", str(number)) for number in range(MAX_EVENTS + 500))
    )
    assert outbox.depth <= MAX_EVENTS + 1
    assert len(outbox.read(("run_report",))) == 1
