"""A container engine of the tests' own, which may be stopped: a second dockerd, cut off from the machine's networks."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BASE, PAUSE = "outrider/base:1", "outrider/pause:1"

LATE_RUNTIME = """#!/bin/sh
runc "$@"
code=$?
for id; do :; done
case " $* " in
*" start "*) if grep -q OUTRIDER_STEP= %(root)s/exec/containerd/daemon/*/%(root_name)s/$id/config.json; then
    while [ -e %(root)s/late ]; do sleep 0.02; done
fi ;;
esac
exit $code
"""
"""An OCI runtime that has started a step's program and does not say so for as long as there is a file."""


class Engine:
    """A second dockerd, cut off from the machine's networks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = str(root / "engine.sock")
        self.late_runtime = root / "late-runtime"
        self.late_runtime.write_text(LATE_RUNTIME % {"root": root, "root_name": root.name})
        self.late_runtime.chmod(0o755)
        self.process: subprocess.Popen[bytes] | None = None
        self.live_restore = False

    def docker(self, *arguments: str) -> str:
        """This engine's own command; its output."""
        command = ["docker", "-H", f"unix://{self.socket}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def start(self, *, live_restore: bool | None = None) -> None:
        """``live_restore``: whether containers survive the next stop of this engine; None: as it was last."""
        self.live_restore = self.live_restore if live_restore is None else live_restore
        self._launch()
        deadline = time.monotonic() + 60
        while subprocess.run(["docker", "-H", f"unix://{self.socket}", "version"], capture_output=True).returncode:
            if self.process is None or self.process.poll() is not None:
                self._launch()  # as a service manager does: it waits in vain for what a killed one left of containerd
            assert time.monotonic() < deadline, "the second engine does not answer"
            time.sleep(0.2)

    def _launch(self) -> None:
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
                "--add-runtime", f"late={self.late_runtime}",
                *(["--live-restore"] if self.live_restore else []),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    @contextmanager
    def starts_come_late(self) -> Iterator[None]:
        """Within, no start of a step by the OCI runtime `late` comes to its end, though the step's program runs."""
        flag = self.root / "late"
        flag.touch()
        try:
            yield
        finally:
            flag.unlink()

    def stop(self, *, kill: bool = False) -> None:
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait(60)
            self.process = None


@contextmanager
def second_engine() -> Iterator[Engine]:
    """A running one that has the images which any step needs."""
    root = Path("/var/tmp") / f"outrider-engine-{secrets.token_hex(4)}"
    root.mkdir()
    engine = Engine(root)
    try:
        engine.start()
        saved = subprocess.Popen(["docker", "save", BASE, PAUSE], stdout=subprocess.PIPE)
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
