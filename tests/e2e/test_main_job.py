"""The demo of the README, as a person runs it: a real game server deployed, played, backed up and stopped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
def test_the_demo_deploys_plays_backs_up_and_stops_a_real_game_server() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/arena/demo.py"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    port = re.search(r"the server on udp port (\d+) answers: 'Outrider arena', Teeworlds 0\.7", done.stdout)
    assert port, done.stdout
    assert "game_port" in done.stdout
    assert "data_dir" in done.stdout
    assert re.search(r"the backup is there: s3://backups/arena-1/\w+\.tar\.zst, [1-9]", done.stdout)
    assert re.search(r"stop-arena.*succeeded", done.stdout)
    assert "demo-secret-key-that-never-shows" not in done.stdout + done.stderr
    left = ["docker", "ps", "--all", "--quiet", "--filter", "label=outrider.node=demo"]
    assert subprocess.run(left, stdout=subprocess.PIPE, text=True, check=True).stdout == ""
