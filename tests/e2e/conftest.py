"""The real parts: `outrider dev` as a process, the `outrider` command as a person runs it, a real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OUTRIDER = Path(sys.executable).with_name("outrider")
READY_TIMEOUT_S = 30.0
# Steps may call the tests' own servers on this machine. A network of the tests' own: what an engine's network lets
# through is said by one agent at a time.
NETWORK = "outrider-e2e"
POLICY = f"networks: {{egress: {{network: {NETWORK}, allow: [private]}}}}\n"


@dataclass(frozen=True, slots=True)
class Dev:
    """A running `outrider dev`, its folder and the environment that points the command line at it."""

    process: subprocess.Popen[bytes]
    folder: Path
    env: dict[str, str]

    def outrider(self, *args: object, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            [str(OUTRIDER), *map(str, args)],
            env=self.env | env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def ok(self, *args: object, stdin: str = "") -> str:
        """Run one command that must succeed; its standard output."""
        done = self.outrider(*args, stdin=stdin)
        assert done.returncode == 0, f"outrider {args}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.log()}"
        return done.stdout

    def json(self, *args: object) -> Any:
        return json.loads(self.ok(*args, "-o", "json"))

    def pipeline(self, text: str, name: str = "pipeline.yaml") -> Path:
        """A pipeline file with this text."""
        file = self.folder / name
        file.write_text(text)
        return file

    def run(self, text: str, *args: object) -> dict[str, Any]:
        """Execute a pipeline on the node to its end; the run as JSON, whether it succeeded or not."""
        done = self.outrider("run", self.pipeline(text), "--node", "dev", "-o", "json", *args)
        assert done.returncode in (0, 1), f"{done.stdout}\n{done.stderr}\n{self.log()}"
        run: dict[str, Any] = json.loads(done.stdout)
        return run

    def log(self) -> str:
        return (self.folder / "dev.log").read_text()[-8000:]


def start_dev(folder: Path, command: Sequence[str] = (str(OUTRIDER),), **extra: str) -> Dev:
    """Start `outrider dev` in ``folder`` and wait until its node is online; ``command`` runs `outrider`."""
    folder.mkdir(parents=True, exist_ok=True)
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    env = os.environ | {"OUTRIDER_CONTEXT": str(folder / "context.yaml")} | extra
    for name in ("OUTRIDER_SERVER", "OUTRIDER_CA", "OUTRIDER_TOKEN"):
        env.pop(name, None)
    with (folder / "dev.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "dev", "--data-dir", folder / "state", "--listen", "127.0.0.1:0", "--policy-file", policy],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    dev = Dev(process, folder, env)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        nodes = dev.outrider("node", "list", "-o", "json")
        if nodes.returncode == 0 and any(node["online"] for node in json.loads(nodes.stdout)):
            return dev
        time.sleep(0.2)
    stop_dev(dev)
    raise AssertionError(f"outrider dev did not get ready:\n{dev.log()}")


def stop_dev(dev: Dev) -> None:
    dev.process.terminate()
    try:
        dev.process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        dev.process.kill()
        dev.process.wait()


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """One `outrider dev` for the tests that do not break it."""
    running = start_dev(tmp_path_factory.mktemp("dev"))
    yield running
    stop_dev(running)
    # Not while a managed container of somebody's is on it.
    subprocess.run(["docker", "network", "rm", NETWORK], capture_output=True, check=False)
