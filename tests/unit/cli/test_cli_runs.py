"""`outrider run`, `runs` and `logs` against a server whose answers are written here."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from outrider.errors import Conflict, InvalidInput, NotFound, Problem, Unavailable
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from tests.unit.cli.conftest import OUTRIDER, Cli

PIPELINE = """\
name: hello
args:
  version: {type: string}
  slots: {type: integer, default: 1}
steps:
  - {name: fetch, uses: container.run, with: {image: "a:1"}}
  - {name: unpack, uses: container.run, with: {image: "a:1"}}
"""
RUN_ID = "rabcdefghij0123456789"


def step(name: str, state: str, **more: Any) -> types.StepStatus:
    return types.StepStatus(
        name=name, uses="container.run", state=types.StepState.Value(f"STEP_STATE_{state}"), attempt=1, **more
    )


def run(state: str, *steps: types.StepStatus, **more: Any) -> types.Run:
    return types.Run(
        run_id=RUN_ID,
        pipeline="hello",
        node_id="n1",
        state=types.RunState.Value(f"RUN_STATE_{state}"),
        steps=steps,
        **more,
    )


TIMES = {"started_at": Timestamp(seconds=100), "finished_at": Timestamp(seconds=102, nanos=500_000_000)}
QUEUED = run("QUEUED", step("fetch", "PENDING"), step("unpack", "PENDING"))
DONE = run("SUCCEEDED", step("fetch", "SUCCEEDED", **TIMES), step("unpack", "SUCCEEDED", **TIMES), **TIMES)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "hello.yaml"
    made.write_text(PIPELINE)
    return made


def script_run(cli: Cli, *states: types.Run) -> None:
    cli.script["ExecutePipeline"] = lambda _request: QUEUED
    cli.script["WatchRun"] = lambda _request: iter(states)


def test_a_run_is_shown_in_lines_and_its_id_is_the_result(cli: Cli, file: Path) -> None:
    loading = step("fetch", "RUNNING", progress=types.Progress(done=5, total=10, unit="bytes"))
    script_run(
        cli,
        run("RUNNING", loading, step("unpack", "PENDING")),
        run("RUNNING", step("fetch", "SUCCEEDED", **TIMES), step("unpack", "WAITING", reason="envs")),
        types.Run(run_id=RUN_ID, pipeline="hello", node_id="n1", state=types.RUN_STATE_SUCCEEDED,
                  steps=DONE.steps, writeback_json=b'{"port": 27960}', **TIMES),
    )  # fmt: skip
    done = cli("run", file, "--node", "n1", "--arg", "version=1.10")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{RUN_ID}\n"
    assert done.stderr.splitlines() == [
        f"run {RUN_ID} of hello on n1: queued",
        f"run {RUN_ID} of hello on n1: running",
        "fetch: running: 50 % of 10 B",
        "fetch: succeeded in 2.5s",
        "unpack: waiting: envs",
        "unpack: succeeded in 2.5s",
        f"run {RUN_ID} of hello on n1: succeeded in 2.5s",
        "  port = 27960",
    ]
    request = cli.script.last(pb.ExecutePipelineRequest)
    assert json.loads(request.args_json) == {"version": "1.10"}
    assert request.pipeline_yaml == PIPELINE.encode()
    assert request.request_id


def test_all_that_is_given_reaches_the_server(cli: Cli, file: Path) -> None:
    script_run(cli)
    done = cli(
        "run", file, "--node", "n1", "--object", "game/a", "--arg", "slots=3", "--arg", "version=x", "--key", "k1",
        "--timeout", "1h30m", "--refuse-if-busy", "--allow-offline", "--detach", "-o", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run_id"] == RUN_ID
    request = cli.script.last(pb.ExecutePipelineRequest)
    assert (request.object.kind, request.object.name, request.key) == ("game", "a", "k1")
    assert json.loads(request.args_json) == {"slots": 3, "version": "x"}
    assert request.timeout.seconds == 5400
    assert request.refuse_if_busy
    assert request.allow_offline
    assert cli.script.count(pb.WatchRunRequest) == 0


def test_a_failed_step_is_told_with_its_last_lines(cli: Cli, file: Path) -> None:
    failure = types.Failure(message="the checksum does not match", hint="expected 12ab", code="checksum")
    script_run(cli, run("FAILED", step("fetch", "FAILED", failure=failure), step("unpack", "SKIPPED")))
    cli.script["StreamRunLogs"] = lambda _request: iter(
        [types.RunLogChunk(step="fetch", attempt=1, data=b"".join(b"line %d\n" % n for n in range(30)) + b"\x1b[2Jend")]
    )
    done = cli("run", file, "--node", "n1", "-o", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["state"] == "failed"
    assert (
        "error: run rabcdefghij0123456789 failed: step fetch: the checksum does not match (expected 12ab)"
        in done.stderr
    )
    assert done.stderr.endswith("  │ line 28\n  │ line 29\n  │ \ufffd[2Jend\n")
    assert "│ line 10\n" not in done.stderr
    request = cli.script.last(pb.StreamRunLogsRequest)
    assert (request.step, request.attempt, request.tail) == ("fetch", 1, 20)


@pytest.mark.parametrize(
    ("final", "code"),
    [
        (run("FAILED", failure=types.Failure(error_class=types.ERROR_CLASS_TIMEOUT, message="it took over 1 s")), 5),
        (run("CANCELLED"), 1),
        (run("UNKNOWN", failure=types.Failure(message="the engine was lost")), 1),
    ],
)
def test_exit_codes_of_runs(cli: Cli, file: Path, final: types.Run, code: int) -> None:
    script_run(cli, final)
    done = cli("run", file, "--node", "n1")
    assert done.returncode == code
    assert "error: run" in done.stderr


def test_a_run_that_took_too_long_is_not_said_to_be_a_step_that_did(cli: Cli, file: Path) -> None:
    own = types.Failure(message="step greet did not end within its timeout", code="step_timeout")
    of_run = types.Failure(
        message="the run did not end within its timeout", code="run_timeout", error_class=types.ERROR_CLASS_TIMEOUT
    )
    script_run(cli, run("FAILED", step("greet", "FAILED", failure=own), failure=of_run))
    done = cli("run", file, "--node", "n1")
    assert done.returncode == 5
    assert "failed: the run did not end within its timeout (it was at greet)\n" in done.stderr


def test_what_is_wrong_is_said_before_the_server_is_asked(cli: Cli, file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: hello\nnmae: x\nsteps:\n  - {name: a, uses: b.c, wiht: {}}\n")
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as opened:
        opened.truncate(100_000_000)
    for arguments, words in (
        (["run", tmp_path / "none.yaml"], ["none.yaml"]),
        (["run", tmp_path], [str(tmp_path)]),
        (["run", huge], ["huge.yaml", "1 MiB"]),
        (["run", wrong], ["wrong.yaml", "line 2", "nmae", "line 4", "wiht"]),
        (["run", file, "--arg", "slots=many"], ["slots", "many"]),
    ):
        started = time.monotonic()
        done = cli(*arguments, "--node", "n1")
        assert time.monotonic() - started < 3
        assert done.returncode == 4, done.stderr
        assert done.stdout == ""
        for word in words:
            assert word in done.stderr
    assert cli.script.count(pb.ExecutePipelineRequest) == 0


def test_what_the_server_refuses_comes_with_every_problem(cli: Cli, file: Path) -> None:
    problems = [
        Problem("is missing", path="steps[0].with.image", line=6),
        Problem("is wrong", path="steps[1].uses", line=7),
    ]

    def refuse(_request: pb.ExecutePipelineRequest) -> types.Run:
        raise InvalidInput("the pipeline does not fit node n1", problems)

    cli.script["ExecutePipeline"] = refuse
    done = cli("run", file, "--node", "n1")
    assert done.returncode == 4
    assert done.stderr == (
        "error: the pipeline does not fit node n1\n"
        "  line 6: steps[0].with.image: is missing\n  line 7: steps[1].uses: is wrong\n"
    )
    for error, code in ((NotFound("there is no node n1"), 4), (Conflict("busy"), 1), (Unavailable("n1 is offline"), 1)):

        def refuse_so(_request: pb.ExecutePipelineRequest, error: Exception = error) -> types.Run:
            raise error

        cli.script["ExecutePipeline"] = refuse_so
        started = time.monotonic()
        assert cli("run", file, "--node", "n1").returncode == code
        assert time.monotonic() - started < 3


def test_the_node_may_come_from_the_environment_and_must_come_from_somewhere(cli: Cli, file: Path) -> None:
    script_run(cli)
    assert cli("run", file, "--detach", OUTRIDER_NODE="n7").returncode == 0
    assert cli.script.last(pb.ExecutePipelineRequest).node_id == "n7"
    done = cli("run", file)
    assert done.returncode == 2
    assert "--node" in done.stderr


def test_ctrl_c_says_how_to_cancel_and_the_second_one_cancels(cli: Cli, file: Path) -> None:
    cancelled = threading.Event()

    def watch(_request: pb.WatchRunRequest) -> Iterator[types.Run]:
        yield run("RUNNING", step("fetch", "RUNNING"))
        assert cancelled.wait(20)
        yield run("CANCELLED", step("fetch", "CANCELLED"))

    def cancel(_request: pb.CancelRunRequest) -> types.Run:
        cancelled.set()
        return run("RUNNING")

    cli.script["ExecutePipeline"] = lambda _request: QUEUED
    cli.script["WatchRun"] = watch
    cli.script["CancelRun"] = cancel
    process = cli.start("run", file, "--node", "n1")
    assert process.stderr is not None
    read_until(process.stderr, "fetch: running")
    process.send_signal(signal.SIGINT)
    said = read_until(process.stderr, "Ctrl-C")
    assert f"outrider runs cancel {RUN_ID}" in said
    assert not cancelled.is_set()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"run {RUN_ID} was cancelled" in rest
    assert cli.script.last(pb.CancelRunRequest).run_id == RUN_ID


def read_until(stream: Any, word: str) -> str:
    said = ""
    while word not in said:
        line = stream.readline()
        assert line, f"{word!r} was never said: {said}"
        said += line
    return said


def test_a_lost_connection_does_not_end_the_following(cli: Cli, file: Path) -> None:
    tries = []

    def watch(_request: pb.WatchRunRequest) -> Iterator[types.Run]:
        tries.append(1)
        yield run("RUNNING", step("fetch", "RUNNING"))
        if len(tries) == 1:
            raise Unavailable("the server is shutting down")
        yield DONE

    cli.script["ExecutePipeline"] = lambda _request: QUEUED
    cli.script["WatchRun"] = watch
    done = cli("run", file, "--node", "n1")
    assert done.returncode == 0, done.stderr
    assert "the server is shutting down; the run goes on, trying to look again" in done.stderr
    assert "the server is back" in done.stderr


def test_on_a_terminal_there_is_a_line_per_step_that_is_drawn_again(cli: Cli, file: Path) -> None:
    def watch(_request: pb.WatchRunRequest) -> Iterator[types.Run]:
        progress = types.Progress(done=5, total=10, unit="bytes", message="arena.7z")
        yield run("RUNNING", step("fetch", "RUNNING", progress=progress), step("unpack", "PENDING"))
        time.sleep(0.5)
        yield DONE

    cli.script["ExecutePipeline"] = lambda _request: QUEUED
    cli.script["WatchRun"] = watch
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [OUTRIDER, "run", file, "--node", "n1"],
        env=cli.env | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # the end of a terminal whose other side is closed
        while part := os.read(ours, 65536):
            drawn += part
    os.close(ours)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out.decode() == f"{RUN_ID}\n"
    text = drawn.decode()
    assert "50 % of 10 B, arena.7z" in text
    assert "━" in text
    assert "\x1b[1A" in text, "lines are drawn over"
    last = text.rsplit("hello on n1", 1)[1]
    assert last.count("✔") == 2
    assert "succeeded" in last


def chunk(name: str, offset: int, data: bytes, **more: Any) -> types.RunLogChunk:
    return types.RunLogChunk(
        run_id=RUN_ID, step=name, attempt=1, stream=types.LOG_STREAM_STDOUT, offset=offset, data=data, **more
    )


def test_logs_of_one_step_are_the_very_bytes(cli: Cli) -> None:
    import zstandard

    cli.script["GetRun"] = lambda _request: DONE
    packed = zstandard.ZstdCompressor().compress(b"packed\n")
    cli.script["StreamRunLogs"] = lambda _request: iter(
        [chunk("fetch", 0, b"\xff\x00"), chunk("fetch", 2, packed, zstd=True)]
    )
    done = cli("logs", "run", "rabc", "fetch", "--tail", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.encode("utf-8", "surrogateescape") == b"\xff\x00packed\n"
    request = cli.script.last(pb.StreamRunLogsRequest)
    assert (request.run_id, request.step, request.tail, request.follow) == (RUN_ID, "fetch", 5, False)


def test_logs_of_several_steps_have_prefixes_and_gaps_are_said(cli: Cli) -> None:
    cli.script["GetRun"] = lambda _request: DONE
    gap = chunk("fetch", 4, b"", gap_bytes=9)
    cli.script["StreamRunLogs"] = lambda _request: iter([chunk("fetch", 0, b"one\n"), gap, chunk("unpack", 0, b"two")])
    done = cli("logs", "run", RUN_ID)
    assert done.stdout == "fetch | one\nunpack | two\n"
    assert done.stderr == "9 bytes are missing here in the stdout of step fetch\n"
    items = [json.loads(line) for line in cli("logs", "run", RUN_ID, "-o", "json").stdout.splitlines()]
    assert [item.get("text") for item in items] == ["one\n", "", "two"]


def test_followed_logs_survive_a_lost_connection_without_a_byte_twice(cli: Cli) -> None:
    tries = []

    def stream(_request: pb.StreamRunLogsRequest) -> Iterator[types.RunLogChunk]:
        tries.append(1)
        yield chunk("fetch", 0, b"abc")
        yield chunk("fetch", 3, b"def")
        if len(tries) == 1:
            raise Unavailable("the server is shutting down")
        yield chunk("fetch", 4, b"efghi")

    cli.script["GetRun"] = lambda _request: DONE
    cli.script["StreamRunLogs"] = stream
    done = cli("logs", "run", RUN_ID, "fetch", "-f")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "abcdefghi"


def test_runs_list_show_cancel(cli: Cli) -> None:
    failed = run("FAILED", step("fetch", "FAILED", failure=types.Failure(message="no space left")), **TIMES)
    cli.script["ListRuns"] = lambda _request: pb.ListRunsResponse(runs=[DONE, failed])
    done = cli("runs", "list", "--state", "failed", "--object", "game/a")
    header, first, second = done.stdout.splitlines()
    assert header.split() == ["RUN", "PIPELINE", "STATE", "NODE", "OBJECT", "STEPS", "TOOK", "AGE"]
    assert first.split()[:6] == [RUN_ID, "hello", "succeeded", "n1", "2/2", "2.5s"]
    assert second.split()[2] == "failed"
    assert list(cli.script.last(pb.ListRunsRequest).states) == [types.RUN_STATE_FAILED]
    assert [item["state"] for item in json.loads(cli("runs", "list", "-o", "json").stdout)] == ["succeeded", "failed"]

    cli.script["GetRun"] = lambda _request: failed
    shown = cli("runs", "show", "rabc").stdout
    assert "no space left" in shown

    cli.script["CancelRun"] = lambda request: run("RUNNING") if request.run_id == "r1" else _none()
    done = cli("runs", "cancel", "r1", "r2")
    assert done.returncode == 3
    assert "cancelling r1" in done.stderr
    assert "error: there is no run r2" in done.stderr


def _none() -> types.Run:
    raise NotFound("there is no run r2")
