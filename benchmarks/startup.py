"""The start of the command line against a bare interpreter's."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks._rig import OUTRIDER, Result

ROUNDS = 15
INVALID = 4
AIM = 10.0


def measure() -> list[Result]:
    starts = [_compared(f"outrider {each}", [each], f"≤ {AIM:.0f}×") for each in ("version", "--help")]
    return [*starts, _refusal()]


def _refusal() -> Result:
    """Wrong parameters of a step: the plugins are imported for it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wrong.yaml"
        file.write_text("name: wrong\nsteps:\n  - {name: a, uses: http.download, with: {ulr: x}}\n")
        return _compared("a wrong pipeline is refused", ["pipeline", "validate", str(file)], "within 1 s", code=INVALID)


def _compared(what: str, arguments: list[str], aim: str, code: int = 0) -> Result:
    ours, bare = [], []
    for _ in range(ROUNDS):
        bare.append(_time([sys.executable, "-c", "pass"]))
        ours.append(_time([str(OUTRIDER), *arguments], code))
    return Result(
        f"{what}, wall time",
        "python -c pass",
        f"{median(mine / yours for mine, yours in zip(ours, bare, strict=True)):.1f}×",
        aim,
        f"{median(ours) * 1000:.0f} ms against {median(bare) * 1000:.0f} ms",
    )


def _time(command: list[str], code: int = 0) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    took = time.perf_counter() - started
    if done.returncode != code:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}: {done.stderr.decode()}")
    return took
