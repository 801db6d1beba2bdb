"""The start of the command line against a bare interpreter's."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from benchmarks._rig import OUTRIDER, Result

ROUNDS = 15
AIM = 10.0


def measure() -> list[Result]:
    results = []
    for arguments in (["version"], ["--help"]):
        ours, bare = [], []
        for _ in range(ROUNDS):
            bare.append(_time([sys.executable, "-c", "pass"]))
            ours.append(_time([str(OUTRIDER), *arguments]))
        ratio = median(mine / yours for mine, yours in zip(ours, bare, strict=True))
        results.append(
            Result(
                f"outrider {arguments[0]}, wall time",
                "python -c pass",
                f"{ratio:.1f}×",
                f"≤ {AIM:.0f}×",
                f"{median(ours) * 1000:.0f} ms against {median(bare) * 1000:.0f} ms",
            )
        )
    return results


def _time(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started
