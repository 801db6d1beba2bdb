"""What began to run though the engine does not know.

An engine that is killed in the middle of a start, and whose containers survive it (`live-restore`), says `created` of
that container when it is back: what it had started runs on unseen, and a start of the same container runs it a second
time. Looked at here is what is left on the machine: the container's control group, its shim and its log. Seen with
20.10; later engines end what runs and start it anew without a word.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_DYING_S = 5.0


def has_begun(container_id: str, engine_root: Path) -> bool:
    """Whether a start of a container that is told as `created` came as far as its program, or may have: it has ended.

    The engine opens the log of a container just before its program is started. Where its directory can't be seen, it
    is taken for begun.
    """
    own = engine_root / "containers" / container_id
    return not own.is_dir() or any((own / name).exists() for name in ("local-logs", f"{container_id}-json.log"))


def processes(container_id: str) -> list[int]:
    """The pids in its control group, by either of the engine's ways to name it; none where groups can't be seen."""
    hierarchy = _CGROUP if (_CGROUP / "cgroup.controllers").exists() else _CGROUP / "pids"
    for group in (f"docker/{container_id}", f"system.slice/docker-{container_id}.scope"):
        with suppress(OSError):
            return [int(pid) for pid in (hierarchy / group / "cgroup.procs").read_text().split()]
    return []


def end(container_id: str) -> None:
    """Kill what runs of it, then its shim: the container runtime clears away what is left. Idempotent."""
    deadline = time.monotonic() + _DYING_S
    while (left := processes(container_id)) and time.monotonic() < deadline:
        _kill(left)
        time.sleep(0.02)
    _kill(_shims(container_id))


def _shims(container_id: str) -> Iterator[int]:
    for process in _PROC.iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"containerd-shim" in words[0] and container_id.encode() in words:
                    yield int(process.name)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
