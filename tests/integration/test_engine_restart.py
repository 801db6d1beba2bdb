"""What happens when the container engine stops and returns: on an engine of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent_core.runtimes.base import ContainerSpec
from agent_core.runtimes.docker import DockerRuntime
from outrider.errors import EngineUnavailable

BASE = "outrider/base:1"


class Engine:
    """A second dockerd, cut off from the machine's networks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = str(root / "engine.sock")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        name = self.root.name
        self.process = subprocess.Popen(
            [
                # In a network namespace of its own: an engine with `--bridge none` removes docker0 where it runs.
                "unshare",
                "--net",
                "dockerd", "--data-root", self.root / "data", "--exec-root", self.root / "exec",
                "--pidfile", self.root / "engine.pid", "-H", f"unix://{self.socket}", "--bridge", "none",
                "--iptables=false", "--ip-forward=false", "--containerd-namespace", name,
                "--containerd-plugins-namespace", f"{name}-plugins",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while subprocess.run(["docker", "-H", f"unix://{self.socket}", "version"], capture_output=True).returncode:
            assert self.process.poll() is None, "the second engine ended"
            assert time.monotonic() < deadline, "the second engine does not answer"
            time.sleep(0.2)

    def stop(self, *, kill: bool = False) -> None:
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait(60)
            self.process = None


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    root = Path("/var/tmp") / f"outrider-engine-{secrets.token_hex(4)}"
    root.mkdir()
    engine = Engine(root)
    try:
        engine.start()
        saved = subprocess.Popen(["docker", "save", BASE], stdout=subprocess.PIPE)
        load = ["docker", "-H", f"unix://{engine.socket}", "load"]
        subprocess.run(load, stdin=saved.stdout, check=True, capture_output=True)
        assert saved.stdout is not None
        saved.stdout.close()
        assert saved.wait() == 0
        yield engine
    finally:
        engine.stop()
        for mount in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if mount.split()[1].startswith(str(root)):
                subprocess.run(["umount", "-l", mount.split()[1]], check=False)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
async def runtime(engine: Engine) -> AsyncIterator[DockerRuntime]:
    driver = DockerRuntime(engine.socket)
    yield driver
    for info in await driver.list():
        await driver.remove(info.id, force=True)
    await driver.aclose()


async def test_end_by_the_engines_own_restart_is_told_from_a_failure(engine: Engine, runtime: DockerRuntime) -> None:
    sleeper = await runtime.create(ContainerSpec(name="sleeper", image=BASE, args=("sleep", "600")))
    await runtime.start(sleeper)
    before = await runtime.info()
    waiting = asyncio.create_task(runtime.exited(sleeper))
    actions: list[str] = []

    async def listen() -> None:
        async with contextlib.aclosing(runtime.events()) as events:
            async for event in events:
                actions.append(event.action)

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.3)
    await asyncio.to_thread(engine.stop)
    with pytest.raises(EngineUnavailable, match="can't be reached"):
        await runtime.inspect(sleeper)
    assert not waiting.done()

    await asyncio.to_thread(engine.start)
    end = await asyncio.wait_for(waiting, 40)
    assert end.engine_stopped
    assert (await runtime.info()).boot != before.boot
    assert "resync" in actions
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)

    # A new attempt works as if nothing had been.
    after = await runtime.create(ContainerSpec(name="after", image=BASE, args=("sh", "-c", "exit 5")))
    await runtime.start(after)
    end = await asyncio.wait_for(runtime.exited(after), 20)
    assert (end.exit_code, end.engine_stopped) == (5, False)
    late = await runtime.exited(sleeper, boot=before.boot)
    assert late.engine_stopped  # also for an agent that only now looks
