"""A lock that a killed process had is there for its successor; one that is held is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from outrider.locking import PATIENCE_S, take_lock


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def test_lock_that_is_held_is_refused_after_a_moment(tmp_path: Path) -> None:
    mine, other = opened(tmp_path / "lock"), opened(tmp_path / "lock")
    take_lock(mine)
    began = time.monotonic()
    with pytest.raises(BlockingIOError):
        take_lock(other)
    assert time.monotonic() - began >= PATIENCE_S
    os.close(mine)
    take_lock(other)
    os.close(other)


def test_lock_that_is_let_go_of_within_the_moment_is_taken(tmp_path: Path) -> None:
    mine, other = opened(tmp_path / "lock"), opened(tmp_path / "lock")
    take_lock(mine)
    threading.Timer(PATIENCE_S / 5, os.close, [mine]).start()
    take_lock(other)
    os.close(other)


def test_lock_of_a_killed_process_is_its_successors(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from outrider.locking import take_lock; "
        "take_lock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "lock"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
    mine = opened(tmp_path / "lock")
    take_lock(mine)
    os.close(mine)
