"""A server beside what others have installed in its environment."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.plugin_fixtures import install
from tests.unit.cli.conftest import OUTRIDER


def test_damaged_metadata_of_a_stranger_stops_no_server(tmp_path: Path) -> None:
    """Alembic reads the entry points of every distribution when it is imported."""
    site = install(tmp_path / "site", "good", "damaged-entry-points", "damaged-metadata")
    env = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
    env["PYTHONPATH"] = str(site)
    where = ["--data-dir", tmp_path / "server", "--listen", "127.0.0.1:0"]
    made = subprocess.run(
        [OUTRIDER, "server", "init", *where], env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert made.returncode == 0, made.stderr
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([OUTRIDER, "server", "run", *where], env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while b"listens on port" not in (tmp_path / "log").read_bytes():
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            server.terminate()
            assert server.wait(60) == 0
        finally:
            server.kill()
