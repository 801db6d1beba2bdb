"""What the plugins' benchmarks share: one command measured, two sides that take turns, rows of the table, test data.

with scratch(need_bytes=4 * GIB) as folder:
    data = random_file(folder / "data", GIB)
    ours = lambda: run_step("s3", "upload", {"bucket": "b", "key": "k", "from": str(data)}, env)
    theirs = lambda: run(["s5cmd", "cp", str(data), "s3://b/k"], env)
    yield Row("s3.upload, 1 GiB", "s5cmd", compare(ours, theirs), at_least=1.5)
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).parents[2]
MIB, GIB = 1024**2, 1024**3
ROUNDS = 5
PYTHON = (sys.executable, "-S")
"""Without `site`: an image has none of the hooks that a development environment runs at every start. What is installed
is found by PYTHONPATH."""

_LIBRARIES = sysconfig.get_path("purelib")
_LAUNCH = Path(__file__).with_name("_launch.py")
HEADER = "| work | against | rate | aim | wall | processor | peak memory |\n| --- | --- | --- | --- | --- | --- | --- |"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one command used."""

    wall_s: float
    cpu_s: float
    """Processor time, user and system, of the command and all that it started and waited for."""
    peak_bytes: int
    """Resident memory of the greatest process of the tree at its peak, never below some 9 MiB."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both sides of a row, each the medians of its rounds."""

    ours: Usage
    theirs: Usage
    rate: float
    """Theirs by ours, wall time: 2 is twice as fast. The median of the rounds' ratios."""
    cpu: float
    """Ours by theirs, processor time: 0.5 is half of it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table. The aim is a rate, or given as words."""

    name: str
    against: str
    compared: Comparison
    at_least: float | None = None
    aim: str = "recorded"

    def line(self) -> str:
        ours, theirs = self.compared.ours, self.compared.theirs
        aim = f"≥ {self.at_least}×" if self.at_least is not None else self.aim
        cells = (
            self.name,
            self.against,
            f"{self.compared.rate:.2f}×",
            aim,
            f"{_seconds(ours.wall_s)} against {_seconds(theirs.wall_s)}",
            f"{_seconds(ours.cpu_s)} against {_seconds(theirs.cpu_s)} ({self.compared.cpu:.2f}×)",
            f"{ours.peak_bytes / MIB:.0f} against {theirs.peak_bytes / MIB:.0f} MiB",
        )
        return f"| {' | '.join(cells)} |"


def _seconds(value: float) -> str:
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def run(
    command: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    *,
    cwd: Path | None = None,
    stdout: Path | None = None,
) -> Usage:
    """Run ``command`` to its end. ``env`` is added to a small one of our own; ``stdout`` goes to a file or nowhere.

    A command that fails ends the benchmark with what it said.
    """
    reading, writing = os.pipe()
    with os.fdopen(reading) as result, open(stdout or os.devnull, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCH), str(writing), *map(str, command)],
            env=_environment() | dict(env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            pass_fds=(writing,),
        )
        os.close(writing)
        _, said = process.communicate()
        used = json.loads(result.read() or '{"code": -1}')
    if used.pop("code") != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))} failed:\n{said.decode(errors='replace')[-4000:]}")
    return Usage(**used)


def run_step(plugin: str, action: str | None, params: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Usage:
    """Run a step program with ``params`` as its inputs, as its image does."""
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as folder:
        (Path(folder) / "inputs.json").write_text(json.dumps(params))
        program = REPOSITORY / "plugins" / plugin / "program"
        command = [*PYTHON, str(program), *([action] if action else [])]
        path = os.pathsep.join([str(REPOSITORY / "stepkit"), _LIBRARIES])
        known = {"OUTRIDER_DIRECTORY": folder, "PYTHONPATH": path, "OUTRIDER_CONTRACT": "1"}
        return run(command, known | dict(env or {}))


def compare(
    ours: Callable[[], Usage],
    theirs: Callable[[], Usage],
    *,
    rounds: int = ROUNDS,
    before: Callable[[], object] = lambda: None,
) -> Comparison:
    """Both sides in turns, after one of each that does not count; ``before`` is called, untimed, before each.

    They take turns so that a drifting machine drifts for both, and who begins changes from round to round.
    """
    mine: list[Usage] = []
    yours: list[Usage] = []
    for number in range(rounds + 1):
        turns = [(ours, mine), (theirs, yours)]
        for side, used in turns if number % 2 else reversed(turns):
            before()
            used.append(side())
        if number == 0:
            mine.clear()
            yours.clear()
    pairs = list(zip(mine, yours, strict=True))
    return Comparison(
        _middle(mine),
        _middle(yours),
        median(b.wall_s / a.wall_s for a, b in pairs),
        median(a.cpu_s / max(b.cpu_s, 1e-3) for a, b in pairs),
    )


def _middle(used: list[Usage]) -> Usage:
    return Usage(median(u.wall_s for u in used), median(u.cpu_s for u in used), int(median(u.peak_bytes for u in used)))


@contextmanager
def scratch(need_bytes: int) -> Iterator[Path]:
    """A folder on a real disk, removed afterwards. Refuses to start where there is no room for it."""
    root = os.environ.get("OUTRIDER_BENCH_DIR", "/var/tmp")  # /tmp may be memory, which is what is measured
    free = shutil.disk_usage(root).free
    if free < need_bytes * 1.2:
        raise SystemExit(
            f"error: {root} has {free / GIB:.1f} GiB free and the benchmark needs {need_bytes * 1.2 / GIB:.1f}: "
            "make room, or set OUTRIDER_BENCH_DIR to another folder"
        )
    with tempfile.TemporaryDirectory(prefix="outrider-bench-", dir=root) as folder:
        yield Path(folder)


def settle() -> None:
    """Have on the disk what a former side has written, so that its writing does not go on beside the next one."""
    os.sync()


def random_file(path: Path, size: int, seed: int = 1) -> Path:
    """``size`` bytes that don't compress, the same for the same seed."""
    source = random.Random(seed)
    with path.open("wb") as file:
        for at in range(0, size, 4 * MIB):
            file.write(source.randbytes(min(4 * MIB, size - at)))
    return path


def text_file(path: Path, size: int, seed: int = 1) -> Path:
    """``size`` bytes that compress about as a build does, to half or so: words, numbers, and some noise."""
    source = random.Random(seed)
    words = [source.randbytes(source.randint(2, 9)).hex().encode() for _ in range(4000)]
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            block = b" ".join(source.choices(words, k=6000)) + source.randbytes(12_000)
            file.write(block[:left])
    return path


def small_files(root: Path, count: int, size: int, seed: int = 1, per_folder: int = 100) -> Path:
    """``count`` files of ``size`` bytes, half of it compressible, ``per_folder`` to a folder."""
    source = random.Random(seed)
    for number in range(count):
        folder = root / f"d{number // per_folder:04}"
        if number % per_folder == 0:
            folder.mkdir(parents=True)
        half = source.randbytes(size // 2)
        (folder / f"f{number:06}.dat").write_bytes(half + (b"%08d " % number) * (size // 9 + 1))
        os.truncate(folder / f"f{number:06}.dat", size)
    return root


def tool(name: str, hint: str) -> str:
    """Where ``name`` is; where it isn't, the benchmark ends with ``hint``, which says how to get it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"error: the benchmark compares with {name}, which is not here: {hint}")
    return found


def version_of(command: Sequence[str]) -> str:
    """The first line that the command says."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout.strip().split("\n")[0]


def _environment() -> dict[str, str]:
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONPATH": _LIBRARIES}
