"""Facts and load of the machine, from psutil."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import Any

import psutil

from outrider.v1 import types_pb2 as types


def machine_facts() -> dict[str, Any]:
    """What does not change while the machine is up. JSON values; sizes in bytes."""
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    return {
        "hostname": socket.gethostname(),
        "os": platform.system().lower(),
        "distribution": release.get("PRETTY_NAME", ""),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "cpus": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def load(volumes: Path) -> types.BriefState:
    """Processor, memory and disk now. The processor's share is that since the call before, in percent of all cores."""
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(str(volumes))
    return types.BriefState(
        cpu_percent=psutil.cpu_percent(None),
        memory_used_bytes=memory.total - memory.available,
        memory_total_bytes=memory.total,
        disk_free_bytes=disk.free,
        disk_total_bytes=disk.total,
    )
