"""What the processes `outrider server run` and `outrider agent run` tell a service manager, without one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

OUTRIDER = Path(sys.executable).with_name("outrider")


@dataclass
class Manager:
    """In systemd's place: starts programs and keeps what each line says, with the time that it came."""

    folder: Path
    environ: dict[str, str]
    socket: socket.socket
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)

    def start(self, *arguments: object, **extra: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [str(OUTRIDER), *map(str, arguments)], env=self.environ | extra, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def listen(self) -> list[str]:
        while True:
            try:
                self.heard += self.socket.recv(65536).decode().split("\n")
            except BlockingIOError:
                return self.heard

    def status(self) -> str:
        return [line for line in self.listen() if line.startswith("STATUS=")][-1].removeprefix("STATUS=")

    def until(self, holds: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{self.heard}\n{(self.folder / 'log').read_text()}"
            time.sleep(0.02)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("OUTRIDER_", "WATCHDOG"))}
        environ |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
        made = Manager(tmp_path, environ, listening)
        yield made
        for process in made.processes:
            process.kill()
            process.wait()


def test_a_server_says_when_it_serves_when_it_reads_its_certificate_anew_and_when_it_stops(manager: Manager) -> None:
    options = ["--data-dir", manager.folder / "server", "--listen", "127.0.0.1:0"]
    subprocess.run([OUTRIDER, "server", "init", *options], check=True, capture_output=True, env=manager.environ)
    process = manager.start("server", "run", *options)
    manager.until(lambda: "READY=1" in manager.listen())
    assert manager.heard[0] == "STATUS=opening the store"
    manager.until(lambda: manager.status().startswith("serving on port "))
    manager.until(lambda: manager.listen().count("WATCHDOG=1") >= 2)
    certificate = manager.folder / "server/tls/server.pem"
    certificate.unlink()
    process.send_signal(signal.SIGHUP)
    manager.until(lambda: manager.listen().count("READY=1") == 2)
    reloading = manager.heard.index("RELOADING=1")
    assert manager.heard[reloading + 1].startswith("MONOTONIC_USEC=")
    assert certificate.exists()
    process.terminate()
    assert process.wait(60) == 0
    manager.until(lambda: manager.listen()[-2:] == ["STOPPING=1", "STATUS=stopping"])


def test_a_certificate_that_can_not_be_read_does_not_end_a_server_that_works(manager: Manager) -> None:
    options = ["--data-dir", manager.folder / "server", "--listen", "127.0.0.1:0"]
    subprocess.run([OUTRIDER, "server", "init", *options], check=True, capture_output=True, env=manager.environ)
    process = manager.start("server", "run", *options)
    manager.until(lambda: "READY=1" in manager.listen())
    (manager.folder / "server/tls/server.pem").write_text("no certificate")
    (manager.folder / "server/tls/ca.key").write_text("no key")
    process.send_signal(signal.SIGHUP)
    manager.until(lambda: manager.listen().count("READY=1") == 2)
    assert "the certificate is not read anew" in (manager.folder / "log").read_text()
    beats = manager.listen().count("WATCHDOG=1")
    manager.until(lambda: manager.listen().count("WATCHDOG=1") > beats)
    assert process.poll() is None


def test_an_agent_whose_token_is_refused_is_never_ready(manager: Manager) -> None:
    options = ["--data-dir", manager.folder / "server", "--listen", "127.0.0.1:0"]
    subprocess.run([OUTRIDER, "server", "init", *options], check=True, capture_output=True, env=manager.environ)
    silent = {name: value for name, value in manager.environ.items() if name != "NOTIFY_SOCKET"}
    with (manager.folder / "server.log").open("wb") as log:
        server = subprocess.Popen([OUTRIDER, "server", "run", *options], env=silent, stdout=log, stderr=log)
    manager.processes.append(server)
    said = manager.folder / "server.log"
    manager.until(lambda: "listens on port" in said.read_text())
    port = said.read_text().partition("listens on port ")[2].split()[0]
    (manager.folder / "token").write_text("orn_wrong\n")
    (manager.folder / "policy.yaml").write_text("warm_none: 0\nnetworks: {}\n")
    agent = manager.start(
        "agent", "run", "--node-id", "n1", "--server", f"localhost:{port}", "--state-dir", manager.folder / "agent",
        "--ca-file", manager.folder / "server/tls/ca.pem", "--policy-file", manager.folder / "policy.yaml",
        CREDENTIALS_DIRECTORY=str(manager.folder),
    )  # fmt: skip
    assert agent.wait(60) == 1
    assert "STATUS=opening the journal" in manager.listen()
    assert "READY=1" not in manager.heard
    assert "error:" in (manager.folder / "log").read_text()


def test_an_agent_tells_its_launcher_when_it_is_connected(manager: Manager) -> None:
    """An environment on trial is judged by it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    silent = {name: value for name, value in manager.environ.items() if name != "NOTIFY_SOCKET"}
    silent["OUTRIDER_CONTEXT"] = str(manager.folder / "context.yaml")
    options = ["--data-dir", manager.folder / "server", "--listen", f"127.0.0.1:{port}"]
    init = [OUTRIDER, "server", "init", *options, "--write-context", "here"]
    subprocess.run(init, check=True, capture_output=True, env=silent)
    with (manager.folder / "server.log").open("wb") as log:
        server = subprocess.Popen([OUTRIDER, "server", "run", *options], env=silent, stdout=log, stderr=log)
    manager.processes.append(server)
    manager.until(lambda: "listens on port" in (manager.folder / "server.log").read_text())
    add = [OUTRIDER, "node", "add", "n1", "--token-file", manager.folder / "token"]
    subprocess.run(add, check=True, capture_output=True, env=silent)
    manager.start(
        "agent", "run", "--node-id", "n1", "--server", f"localhost:{port}", "--state-dir", manager.folder / "agent",
        "--ca-file", manager.folder / "server/tls/ca.pem", CREDENTIALS_DIRECTORY=str(manager.folder),
        OUTRIDER_AGENT_ENGINE_SOCKET=str(manager.folder / "no.sock"),
    )  # fmt: skip
    connected = f"X_OUTRIDER_CONNECTED=localhost:{port}"
    manager.until(lambda: connected in manager.listen())
    order = [manager.heard.index(line) for line in ("X_OUTRIDER_CONNECTED=", "READY=1", connected)]
    assert order == sorted(order)


def test_an_agent_is_ready_once_it_knows_what_it_lacks_and_falls_silent_when_it_is_frozen(manager: Manager) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{unused.getsockname()[1]}"
    (manager.folder / "token").write_text("orn_token\n")
    process = manager.start(
        "agent", "run", "--node-id", "n1", "--server", server, "--state-dir", manager.folder / "agent",
        CREDENTIALS_DIRECTORY=str(manager.folder), OUTRIDER_AGENT_ENGINE_SOCKET=str(manager.folder / "no.sock"),
    )  # fmt: skip
    manager.until(lambda: "READY=1" in manager.listen())
    manager.until(lambda: "not connected to" in manager.status())
    assert manager.status().startswith(f"not connected to {server} (")
    assert "engine missing (" in manager.status()
    assert manager.status().endswith("; 0 runs")
    assert [line for line in manager.listen() if "CONNECTED" in line] == ["X_OUTRIDER_CONNECTED="]
    assert (manager.folder / "agent/journal.db").exists()
    manager.until(lambda: manager.listen().count("WATCHDOG=1") >= 2)
    process.send_signal(signal.SIGSTOP)
    manager.until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    before = len(manager.listen())
    time.sleep(2.5)  # the limit that it was given, and more
    assert len(manager.listen()) == before
    # The manager's SIGABRT, which it lets SIGCONT follow: the log then has where each thread stood.
    process.send_signal(signal.SIGABRT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == -signal.SIGABRT
    log = (manager.folder / "log").read_text()
    assert "Fatal Python error: Aborted" in log
    assert "orn_token" not in log
