"""The launcher as a process: which environment it starts, what it makes of how that fares, and what it tells systemd.

The environments are scripts that do as their name says, each with a NOTIFY_SOCKET of the launcher's.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider import launcher

LAUNCHER = Path(launcher.__file__)
WITHIN_S = 20.0
AGENT = """\
#!{python} -IS
import os, signal, socket, sys, time
home = {home!r}
with open(home + "/starts", "a") as file:
    print({name!r}, *sys.argv[1:], file=file)
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.sendto(text.encode(), "\\0" + os.environ["NOTIFY_SOCKET"][1:])
def end(*_):
    say("STOPPING=1")
    with open(home + "/ends", "a") as file:
        print({name!r}, file=file)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
assert "WATCHDOG_PID" not in os.environ
{does}
"""
WELL = "say('READY=1\\nSTATUS={name}')\nwhile True:\n    say('WATCHDOG=1')\n    time.sleep(0.05)"
HANGS = "while True: time.sleep(0.05)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANGS
CRASHES = "sys.exit(7)"
TELLS = "say('X_OUTRIDER_CONNECTED=')\nsay('READY=1')\n"
READY_THEN_CRASHES = "say('READY=1')\ntime.sleep(0.1)\nos.kill(os.getpid(), signal.SIGKILL)"


def connects(port: int) -> str:
    """To a server of this port, once there is a file of this name."""
    home = "while not os.path.exists(home + '/{name}.connects'): time.sleep(0.01)"
    return f"{TELLS}{home}\nsay('X_OUTRIDER_CONNECTED=127.0.0.1:{port}')\n{HANGS}"


class Site:
    """A directory of environments, a launcher, and the service manager's end of its line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "environments"
        self.home.mkdir()
        self.heard: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.line.bind(str(folder / "notify"))
        self.environment("", WELL)

    def environment(self, name: str, does: str, **about: Any) -> None:
        program = self.home / name / "bin" / "outrider" if name else self.folder / "installed" / "bin" / "outrider"
        program.parent.mkdir(parents=True, exist_ok=True)
        text = AGENT.format(python=sys.executable, home=str(self.folder), name=name or "installed", does=does)
        program.write_text(text.replace("{name}", name or "installed"))
        program.chmod(0o755)
        if about:
            (self.home / name / launcher.ABOUT).write_text(json.dumps(about))

    def start(self, *options: str) -> None:
        given = ["--ready-within", "3", "--steady", "0.3", "--grace", "1", "--pause", "0.05", *options]
        command = [sys.executable, "-IS", LAUNCHER, "--environments", self.home]
        command += ["--initial", self.folder / "installed/bin/outrider", *given, "--", "agent", "run", "--flag", "x"]
        env = os.environ | {"NOTIFY_SOCKET": str(self.folder / "notify"), "WATCHDOG_PID": "1", "WATCHDOG_USEC": "1"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stderr=log)

    def want(self, name: str, request: str = "r1", *, tell: bool = True) -> None:
        launcher.write_json(self.home / launcher.WANTED, {"environment": name, "request": request})
        if tell and self.process is not None:
            self.until(lambda: launcher.running(self.home))
            os.kill(self.process.pid, signal.SIGHUP)

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(WITHIN_S)

    @property
    def state(self) -> dict[str, Any]:
        return launcher.read_json(self.home / launcher.STATE)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def starts(self) -> list[str]:
        return [line.split()[0] for line in self.lines("starts")]

    def said(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard += self.line.recv(8192).decode().split("\n")
        return self.heard

    def until(self, holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not holds():
            assert time.monotonic() < deadline, f"{self.state}\n{(self.folder / 'log').read_text()}"
            time.sleep(0.02)

    def until_current(self, name: str) -> None:
        self.until(lambda: self.state.get("current") == name and not self.state.get("trial"))

    def until_refused(self, request: str = "r1") -> str:
        self.until(lambda: self.state.get("refused", {}).get("request") == request)
        return str(self.state["refused"]["reason"])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()
    made.line.close()


def test_it_stands_on_the_standard_library_alone() -> None:
    tree = ast.parse(LAUNCHER.read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} <= set(sys.stdlib_module_names)


def test_without_environments_the_installed_program_runs_and_the_manager_hears_it(site: Site) -> None:
    site.start()
    site.until(lambda: "READY=1" in site.said())
    assert site.lines("starts") == ["installed agent run --flag x"]
    assert site.end() == 0
    assert "STATUS=installed" in site.said()
    assert "STOPPING=1" in site.said()
    assert site.lines("ends") == ["installed"]
    assert not launcher.running(site.home)


def test_a_new_environment_that_stays_well_becomes_the_current_one_and_the_former_is_kept(site: Site) -> None:
    site.environment("one", WELL)
    site.start()
    site.until(lambda: "READY=1" in site.said())
    site.want("one")
    site.until_current("one")
    assert site.state["former"] == ""
    assert (site.home / launcher.LINK / "bin/outrider").resolve() == (site.home / "one/bin/outrider").resolve()
    assert site.starts == ["installed", "one"]
    assert "STOPPING=1" not in site.said()  # the service did not stop
    assert site.end() == 0
    site.start()
    site.until(lambda: site.starts == ["installed", "one", "one"])


@pytest.mark.parametrize(
    ("does", "starts", "reason"),
    [
        (CRASHES, 3, "its agent ended with exit code 7"),
        (READY_THEN_CRASHES, 3, "its agent ended by signal 9 (Killed)"),
        (HANGS, 1, "it was not ready within 1 s"),
        (DEAF, 1, "it was not ready within 1 s"),
    ],
)
def test_one_that_does_not_get_well_is_left_again_by_itself(site: Site, does: str, starts: int, reason: str) -> None:
    site.environment("bad", does)
    site.start("--ready-within", "1")
    site.until(lambda: "READY=1" in site.said())
    site.want("bad")
    assert site.until_refused() == reason
    site.until(lambda: site.starts == ["installed", *["bad"] * starts, "installed"])
    assert site.state["current"] == ""
    assert site.state["refused"]["environment"] == "bad"
    assert launcher.running(site.home) == (site.process.pid if site.process else 0)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A port that is somebody's; nobody is there before it listens."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made


def connected(site: Site, server: socket.socket, *options: str) -> int:
    """Start a launcher whose agent is connected to ``server``, and would be in environment `new` if let; the port."""
    port: int = server.getsockname()[1]
    site.environment("", connects(port))
    site.environment("new", connects(port))
    (site.folder / "installed.connects").touch()
    site.start(*options)
    site.until(lambda: site.state.get("server") == f"127.0.0.1:{port}")
    return port


def test_one_that_does_not_connect_to_a_server_that_is_there_is_left_again(site: Site, server: socket.socket) -> None:
    server.listen()
    port = connected(site, server, "--connect-within", "0.5")
    site.want("new")
    assert site.until_refused() == f"it did not connect to the server 127.0.0.1:{port} within 0.5 s"
    site.until(lambda: site.starts == ["installed", "new", "installed"])
    assert (site.state["current"], site.state["server"]) == ("", f"127.0.0.1:{port}")


def test_one_that_connects_is_kept_and_the_next_has_to_as_well(site: Site, server: socket.socket) -> None:
    server.listen()
    port = connected(site, server, "--connect-within", "0.5")
    (site.folder / "new.connects").touch()
    site.want("new")
    site.until_current("new")
    assert site.state["server"] == f"127.0.0.1:{port}"
    site.environment("deaf", TELLS + HANGS)
    site.want("deaf", "r2")
    assert "did not connect" in site.until_refused("r2")


def test_a_server_that_is_away_is_no_fault_of_an_environment(site: Site, server: socket.socket) -> None:
    port = connected(site, server, "--connect-within", "0.3")
    site.want("new")
    site.until(lambda: "can't be reached" in site.state.get("trial", {}).get("waits", ""))
    time.sleep(0.5)
    assert site.state["trial"]["environment"] == "new"
    assert site.starts == ["installed", "new"]
    (site.folder / "new.connects").touch()
    site.until_current("new")
    assert site.state["server"] == f"127.0.0.1:{port}"


def test_its_time_to_connect_runs_once_the_server_is_back(site: Site, server: socket.socket) -> None:
    connected(site, server, "--connect-within", "0.3")
    site.want("new")
    site.until(lambda: "can't be reached" in site.state.get("trial", {}).get("waits", ""))
    server.listen()
    assert "did not connect" in site.until_refused()


def test_a_server_that_stays_away_ends_the_trial_in_the_end(site: Site, server: socket.socket) -> None:
    port = connected(site, server, "--away", "0.5")
    site.want("new")
    assert (
        site.until_refused() == f"the server 127.0.0.1:{port} could not be reached for 0.5 s, so it could not connect"
    )
    site.until(lambda: site.starts == ["installed", "new", "installed"])


@pytest.mark.parametrize(("former", "new"), [(TELLS + HANGS, TELLS + HANGS), (None, WELL)])
def test_nothing_is_asked_that_the_former_did_not_do_or_that_the_agent_says_nothing_of(
    site: Site, server: socket.socket, former: str | None, new: str
) -> None:
    server.listen()
    if former is None:
        connected(site, server, "--connect-within", "0.2")
    else:
        site.environment("", former)
        site.start("--connect-within", "0.2")
        site.until(lambda: "READY=1" in site.said())
    site.environment("new", new)
    site.want("new")
    site.until_current("new")


def test_a_trial_ends_when_the_current_environment_is_wanted_again(site: Site, server: socket.socket) -> None:
    connected(site, server)
    site.want("new")
    site.until(lambda: site.state.get("trial", {}).get("ready"))
    site.want("", "r2")
    site.until(lambda: site.starts == ["installed", "new", "installed"])
    assert site.state["trial"] == {}


def test_what_is_refused_is_tried_again_when_it_is_asked_for_again_and_not_by_itself(site: Site) -> None:
    site.environment("bad", CRASHES)
    site.want("bad")
    site.start()
    site.until_refused()
    site.until(lambda: site.starts[-1] == "installed")
    site.end()
    count = len(site.starts)
    site.start()
    site.until(lambda: len(site.starts) > count)
    assert site.starts[count:] == ["installed"]
    site.want("bad", "r2")
    site.until_refused("r2")
    assert site.starts[count:].count("bad") == 3


def test_an_environment_without_a_program_is_refused_without_a_start(site: Site) -> None:
    site.want("gone")
    site.start()
    assert "there is no program" in site.until_refused()
    site.until(lambda: site.starts == ["installed"])


def test_tries_are_counted_across_deaths_of_the_launcher(site: Site) -> None:
    """An environment that takes the machine down at each start must not be tried for ever."""
    site.environment("deadly", "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)")
    site.want("deadly")
    for _ in range(2):
        site.start("--tries", "2")
        assert site.process is not None
        assert site.process.wait(WITHIN_S) == -signal.SIGKILL
    site.start("--tries", "2")
    assert "it was started 2 times" in site.until_refused()
    site.until(lambda: site.starts == ["deadly"] * 2 + ["installed"])


def test_a_stop_during_a_trial_counts_for_nothing(site: Site) -> None:
    site.environment("one", WELL)
    site.want("one")
    for _ in range(2):
        site.start("--steady", "600", "--tries", "1")
        site.until(lambda: site.state.get("trial", {}).get("ready"))
        assert site.end() == 0
    assert site.starts == ["one"] * 2
    site.start("--tries", "1")
    site.until_current("one")


def test_the_agent_dies_with_its_launcher(site: Site) -> None:
    site.start()
    site.until(lambda: "READY=1" in site.said())
    assert site.process is not None
    children = Path(f"/proc/{site.process.pid}/task/{site.process.pid}/children").read_text().split()
    assert len(children) == 1
    site.end(signal.SIGKILL)
    site.until(lambda: not Path(f"/proc/{children[0]}/cmdline").exists() or _is_zombie(int(children[0])))


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    return True


def test_an_end_of_the_current_one_is_the_launchers_end_with_the_same_code(site: Site) -> None:
    site.environment("", CRASHES)
    site.start()
    assert site.process is not None
    assert site.process.wait(WITHIN_S) == 7
    assert site.starts == ["installed"]


def test_where_the_former_agent_can_not_read_the_journal_any_more_the_new_one_is_kept(site: Site) -> None:
    """Going back would leave the node without any agent."""
    with contextlib.closing(sqlite3.connect(site.folder / "journal.db")) as db:
        db.execute("PRAGMA user_version=12")
    (site.home / launcher.INITIAL_ABOUT).write_text(json.dumps({"journal_form": 11}))
    site.environment("bad", CRASHES, journal_form=12)
    site.want("bad")
    site.start()
    site.until_current("bad")
    assert site.state["refused"] == {}
    assert "can't read the journal any more (form 12, it knows 11)" in (site.folder / "log").read_text()


def test_a_current_environment_that_is_gone_gives_way_to_the_former(site: Site) -> None:
    site.environment("old", WELL)
    launcher.write_json(site.home / launcher.STATE, {"current": "gone", "former": "old"})
    site.start()
    site.until(lambda: site.starts == ["old"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"current": 7, "trial": 1}'])
def test_a_state_that_can_not_be_read_means_the_installed_program(site: Site, text: str) -> None:
    (site.home / launcher.STATE).write_text(text)
    (site.home / launcher.WANTED).write_text(text)
    site.start()
    site.until(lambda: site.starts == ["installed"])


def test_what_strangers_say_on_the_line_is_dropped(site: Site) -> None:
    site.environment("one", HANGS)
    site.want("one")
    site.start("--ready-within", "1.5")
    site.until(lambda: site.starts == ["one"])
    assert site.process is not None
    names = [
        line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@outrider-launcher" in line
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        for name in names:
            with contextlib.suppress(OSError):
                line.sendto(b"READY=1", "\0" + name[1:])
    assert "was not ready" in site.until_refused()


def test_a_second_launcher_on_the_same_environments_is_refused(site: Site) -> None:
    site.start()
    site.until(lambda: launcher.running(site.home))
    command = [sys.executable, "-IS", LAUNCHER, "--environments", site.home, "--initial", "/bin/true", "--", "x"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert second.stderr == f"launcher: another launcher has {site.home}\n"


def test_a_frozen_agent_gets_the_abort_that_the_watchdog_sends(site: Site) -> None:
    site.start()
    site.until(lambda: "READY=1" in site.said())
    assert site.process is not None
    child = int(Path(f"/proc/{site.process.pid}/task/{site.process.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGSTOP)
    assert site.end(signal.SIGABRT) == 128 + signal.SIGABRT
