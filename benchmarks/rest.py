"""The agent at rest: memory and processor time over a minute, against a bare interpreter that sleeps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks._rig import OUTRIDER, Result

MINUTE_S = 60
SETTLE_S = 10


def measure() -> list[Result]:
    folder = Path(tempfile.mkdtemp(prefix="outrider-rest-"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        agent = _start_both(folder, started)
        bare = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        started.append(bare)
        time.sleep(SETTLE_S)
        process = psutil.Process(agent.pid)
        before = process.cpu_times()
        time.sleep(MINUTE_S)
        after = process.cpu_times()
        resident = process.memory_info().rss / 2**20
        cpu = (after.user + after.system - before.user - before.system) / MINUTE_S * 100
        empty = psutil.Process(bare.pid).memory_info().rss / 2**20
    finally:
        for child in reversed(started):
            child.send_signal(signal.SIGTERM)
        for child in started:
            child.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
    return [
        Result(
            "agent at rest, resident memory",
            "a sleeping python",
            f"{resident / empty:.1f}×",
            "recorded",
            f"{resident:.0f} MiB against {empty:.0f} MiB",
        ),
        Result("agent at rest, processor", "one core", f"{cpu:.2f} %", "recorded", f"over {MINUTE_S} s"),
    ]


def _start_both(folder: Path, started: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Server and agent as two processes, as in production; returns the agent's."""
    env = os.environ | {"OUTRIDER_CONTEXT": str(folder / "context.yaml"), "OUTRIDER_SERVER_LISTEN": "127.0.0.1:18643"}
    data = folder / "server"
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([OUTRIDER, "server", "init", "--data-dir", data, "--write-context", "rest"], check=True, **quiet)  # type: ignore[call-overload]
    started.append(subprocess.Popen([OUTRIDER, "server", "run", "--data-dir", data], **quiet))  # type: ignore[call-overload]
    deadline = time.monotonic() + 30
    while True:
        added = subprocess.run(
            [OUTRIDER, "node", "add", "rest", "-o", "json"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if added.returncode == 0:
            break
        if time.monotonic() > deadline:
            raise SystemExit("error: the server did not start")
        time.sleep(0.3)
    token = folder / "token"
    token.write_text(json.loads(added.stdout)["token"])
    token.chmod(0o600)
    agent: subprocess.Popen[bytes] = subprocess.Popen(
        [
            OUTRIDER, "agent", "run", "--server", "127.0.0.1:18643", "--node-id", "rest", "--token-file", token,
            "--ca-file", data / "tls" / "ca.pem", "--state-dir", folder / "agent",
        ],
        **quiet,  # type: ignore[call-overload]
    )  # fmt: skip
    started.append(agent)
    return agent
