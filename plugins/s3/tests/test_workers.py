"""How many threads a transfer has."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "program"))

from s3_transfer.workers import Workers

_PATIENCE_S = 20.0


def test_threads_are_added_while_the_store_is_what_is_waited_for() -> None:
    together = threading.Barrier(8)  # passes only when all eight run at once
    with Workers(8, at_first=2) as workers:
        futures = [workers.submit(lambda: together.wait(_PATIENCE_S)) for _ in range(8)]
        assert sorted(workers.result(future) for future in futures) == list(range(8))


def test_never_more_threads_than_connections_were_asked_for() -> None:
    running, most, lock = 0, 0, threading.Lock()
    pause = threading.Event()

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        pause.wait(0.1)
        with lock:
            running -= 1

    with Workers(3, at_first=2) as workers:
        for future in [workers.submit(job) for _ in range(12)]:
            workers.result(future)
    assert most == 3
