"""The command line against the real thing: `outrider dev`, and server and agent as two processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import OUTRIDER, Dev, start_dev, stop_dev

HELLO = """\
name: hello
args: {who: {type: string, default: world}}
steps:
  - name: greet
    uses: container.run
    with: {image: "outrider/base:1", args: ["echo", "hello ${{ args.who }}"]}
  - name: again
    uses: container.run
    with: {image: "outrider/base:1", args: ["sh", "-c", "printf '\\\\377\\\\000'; echo oops >&2"]}
"""
SLOW = """\
name: slow
steps:
  - name: count
    uses: container.run
    with: {image: "outrider/base:1", args: ["python3", "-uc", "%s"]}
"""
STOP_AT_ONCE = "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(9))"
COUNT = f"{STOP_AT_ONCE}; [(print(i), time.sleep(.1)) for i in range(600)]"


def step_log(dev: Dev, run_id: str, step: str) -> bytes:
    command = [OUTRIDER, "logs", "run", run_id, step]
    return subprocess.run(command, env=dev.env, stdout=subprocess.PIPE, check=True, timeout=30).stdout


def test_a_run_its_logs_and_its_record(dev: Dev) -> None:
    done = dev.outrider("run", dev.pipeline(HELLO), "--arg", "who=1.10")
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.strip()
    assert "greet: succeeded" in done.stderr
    assert f"run {run_id} of hello on dev: succeeded" in done.stderr
    assert step_log(dev, run_id, "greet") == b"hello 1.10\n"
    assert sorted(step_log(dev, run_id, "again")) == sorted(b"\xff\x00oops\n")
    shown = dev.json("runs", "show", run_id)
    assert [step["state"] for step in shown["steps"]] == ["succeeded", "succeeded"]
    assert shown["args"] == {"who": "1.10"}
    assert run_id in dev.ok("runs", "list")
    assert "run.finished" in dev.ok("events", "--subject", run_id)


def test_the_same_key_is_the_same_run(dev: Dev) -> None:
    first = dev.ok("run", dev.pipeline(HELLO), "--key", "deploy-1")
    assert dev.ok("run", dev.pipeline(HELLO), "--key", "deploy-1") == first
    done = dev.outrider("run", dev.pipeline(HELLO), "--key", "deploy-1", "--arg", "who=another")
    assert done.returncode == 1
    assert "deploy-1" in done.stderr


def test_a_followed_log_grows_and_a_cancelled_run_ends(dev: Dev) -> None:
    run_id = dev.ok("run", dev.pipeline(SLOW % COUNT), "--detach").strip()
    with subprocess.Popen([OUTRIDER, "logs", "run", run_id, "-f"], env=dev.env, stdout=subprocess.PIPE) as logs:
        assert logs.stdout is not None
        assert [logs.stdout.readline() for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]
        assert dev.outrider("runs", "cancel", run_id, "--wait").returncode == 0
        rest = logs.stdout.read()
        assert logs.wait(20) == 0
    lines = [b"0", b"1", b"2", *rest.split()]
    assert lines == [str(number).encode() for number in range(len(lines))]
    assert dev.json("runs", "show", run_id)["state"] == "cancelled"
    assert b"\n".join(lines) + b"\n" == step_log(dev, run_id, "count")


def test_a_run_that_takes_too_long_has_an_exit_code_of_its_own(dev: Dev) -> None:
    done = dev.outrider("run", dev.pipeline(SLOW % COUNT), "--timeout", "1s")
    assert done.returncode == 5, done.stderr
    assert "timeout" in done.stderr


def test_a_failing_step_is_told_with_what_it_said_last(dev: Dev) -> None:
    done = dev.outrider("run", dev.pipeline(SLOW % "print('the reason'); raise SystemExit(3)"))
    assert done.returncode == 1
    assert "step count ended with exit code 3" in done.stderr
    assert "│ the reason" in done.stderr


def test_another_dev_disturbs_nothing(dev: Dev, tmp_path: Path) -> None:
    before = Path(dev.env["OUTRIDER_CONTEXT"]).read_text()
    server = dev.json("version", "--server")["server"]
    assert server["nodes_online"] == 1
    for arguments, words in (
        (["--data-dir", dev.folder / "state"], ["another `outrider dev`", str(dev.folder / "state")]),
        (["--data-dir", tmp_path / "state"], ["context 'dev'", "--context"]),
    ):
        started = time.monotonic()
        done = dev.outrider("dev", *arguments, "--listen", "127.0.0.1:0")
        assert time.monotonic() - started < 3
        assert done.returncode == 1
        for word in words:
            assert word in done.stderr
    assert Path(dev.env["OUTRIDER_CONTEXT"]).read_text() == before


def test_a_context_of_someone_else_is_not_overwritten(dev: Dev, tmp_path: Path) -> None:
    context = tmp_path / "context.yaml"
    context.write_text("current: dev\ncontexts:\n  dev: {server: games.example, token: precious}\n")
    done = dev.outrider(
        "dev", "--data-dir", tmp_path / "state", "--listen", "127.0.0.1:0", OUTRIDER_CONTEXT=str(context)
    )
    assert done.returncode == 1
    assert "context 'dev'" in done.stderr
    assert "precious" in context.read_text()


def test_dev_stops_on_a_signal_and_goes_on_where_it_was(tmp_path: Path) -> None:
    first = start_dev(tmp_path)
    try:
        first.ok("object", "set", "game/a", "slots=16")
        run_id = first.ok("run", first.pipeline(HELLO)).strip()
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(20) == 0, first.log()
        assert "Traceback" not in first.log()
        done = first.outrider("node", "list")
        assert done.returncode == 1
        assert "nothing listens at" in done.stderr
    finally:
        stop_dev(first)
    second = start_dev(tmp_path)
    try:
        assert second.json("object", "get", "game/a")["attributes"] == {"slots": 16}
        assert second.json("runs", "show", run_id)["state"] == "succeeded"
        assert second.outrider("run", second.pipeline(HELLO)).returncode == 0
    finally:
        stop_dev(second)
    assert second.process.returncode == 0


@contextmanager
def process(env: dict[str, str], log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as opened:
        started = subprocess.Popen([OUTRIDER, *map(str, arguments)], env=env, stdout=opened, stderr=opened)
    try:
        yield started
    finally:
        started.terminate()
        assert started.wait(30) == 0, log.read_text()


def test_server_and_agent_as_two_processes(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
    env["OUTRIDER_CONTEXT"] = str(tmp_path / "context.yaml")
    port = free_port()
    cli = Dev(subprocess.Popen([sys.executable, "-c", ""]), tmp_path, env)
    cli.process.wait()
    made = cli.json(
        "server", "init", "--data-dir", tmp_path / "s", "--listen", f"127.0.0.1:{port}", "--write-context", "x"
    )
    again = cli.outrider("server", "init", "--data-dir", tmp_path / "s")
    assert again.returncode == 1
    other = cli.outrider("server", "init", "--data-dir", tmp_path / "other", "--listen", "127.0.0.1:0", "--name", "x y")
    command = f"outrider server run --data-dir {tmp_path}/other --listen 127.0.0.1:0 --name 'x y'"
    assert other.stderr.endswith(f"start it with: {command}\n")
    assert (tmp_path / "context.yaml").stat().st_mode & 0o777 == 0o600
    with process(
        env | {"OUTRIDER_SERVER_LISTEN": f"127.0.0.1:{port}"}, tmp_path / "dev.log", "server", "run",
        "--data-dir", tmp_path / "s",
    ):  # fmt: skip
        until(lambda: cli.outrider("node", "list").returncode == 0)
        cli.ok("node", "add", "two", "--token-file", tmp_path / "token")
        (tmp_path / "agent.yaml").write_text(
            json.dumps(
                {"node_id": "two", "server": f"127.0.0.1:{port}", "ca_file": made["ca"], "labels": {"zone": "eu"}}
            )
        )
        agent = ["--config", tmp_path / "agent.yaml", "--token-file", tmp_path / "token", "--state-dir", tmp_path / "a"]
        settings = cli.json("agent", "config", *agent)
        assert settings["labels"] == {"value": {"zone": "eu"}, "from": str(tmp_path / "agent.yaml")}
        assert settings["token_file"]["from"] == "flag"
        assert cli.outrider("agent", "status", "--state-dir", tmp_path / "a").returncode == 1
        with process(env, tmp_path / "dev.log", "agent", "run", *agent):
            until(lambda: cli.json("node", "show", "two")["online"])
            assert cli.json("agent", "status", "--state-dir", tmp_path / "a")["node_id"] == "two"
            run = cli.json("run", cli.pipeline(HELLO), "--node", "two")
            assert run["state"] == "succeeded"
        until(lambda: not cli.json("node", "show", "two")["online"])
        done = cli.outrider("run", cli.pipeline(HELLO), "--node", "two")
        assert done.returncode == 1
        assert "offline" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"it did not come to hold within {seconds:g} s")
        time.sleep(0.2)
