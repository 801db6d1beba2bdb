"""archive.extract and archive.create against GNU tar with zstd and pigz, 7zz, and Python's tarfile.

Both sides end with their data on the disk: the step syncs before it publishes, so the other tools get a ``sync -f``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.plugins._rig import (
    GIB,
    MIB,
    PYTHON,
    ROUNDS,
    Comparison,
    Row,
    Usage,
    compare,
    run,
    run_step,
    scratch,
    settle,
    small_files,
    text_file,
    tool,
    version_of,
)

HINT = "apt-get install 7zip pigz zstd"
SLOW = 2
"""Rounds where a single one takes minutes."""
SIZE_MIB = int(os.environ.get("OUTRIDER_BENCH_MIB", "1024"))
"""The large file; a smaller one for a quick look, with fewer small files beside it."""
DEFAULTS = {
    "extract": {
        "existing": "merge",
        "include": [],
        "exclude": [],
        "strip_components": 0,
        "symlinks": "refuse",
        "permissions": "keep",
        "max_bytes": 64 * GIB,
        "max_entries": 1_000_000,
        "max_depth": 128,
        "max_ratio": 1000,
    },
    "create": {
        "existing": "replace",
        "include": [],
        "exclude": [],
        "symlinks": "refuse",
        "reproducible": False,
        "encrypt": False,
    },
}
TARFILE = """
import sys, tarfile
from backports import zstd
with zstd.open(sys.argv[1]) as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
    archive.extractall(sys.argv[2], filter="data")
"""


def versions() -> list[str]:
    """The tools that are compared with."""
    return [
        version_of([tool("tar", HINT), "--version"]),
        version_of([tool("zstd", HINT), "--version"]).strip("* "),
        version_of([tool("pigz", HINT), "--version"]),
        " ".join(subprocess.run([tool("7zz", HINT)], stdout=subprocess.PIPE, text=True).stdout.split()[:3]),
        f"isal {version('isal')}, backports.zstd {version('backports.zstd')}, py7zr {version('py7zr')}",
    ]


def measure() -> Iterator[Row]:
    for name in ("tar", "zstd", "pigz", "7zz"):
        tool(name, HINT)
    with scratch((1 + SIZE_MIB // 128) * GIB) as folder:
        yield from _many(folder)
        tree = folder / "tree"
        shutil.rmtree(tree)
        small_files(tree, 10_000 * SIZE_MIB // 1024, 16 * 1024)
        (tree / "big").mkdir()
        text_file(tree / "big" / "data", SIZE_MIB * MIB)
        yield from _mixed(folder, tree)


def _many(folder: Path) -> Iterator[Row]:
    bench = _Bench(folder, small_files(folder / "tree", 20_000, 8 * 1024))
    bench.theirs_create("tar.zst", f"tar -I 'zstd -T0' -cf {{archive}} -C {bench.tree} .")()
    name = "archive.extract tar.zst, 20,000 files"
    yield Row(name, "tar -I zstd", bench.extract("tar.zst", "tar -I zstd -xf {archive} -C {out}"), at_least=1.0)
    reader = f"{shlex.join(PYTHON)} -c {shlex.quote(TARFILE)} {{archive}} {{out}}"
    yield Row(name, "Python's tarfile", bench.extract("tar.zst", reader, rounds=3), at_least=4)


def _mixed(folder: Path, tree: Path) -> Iterator[Row]:
    bench = _Bench(folder, tree)
    both = f"{SIZE_MIB} MiB and {10_000 * SIZE_MIB // 1024:,} files"
    for kind, program, aims, against in (
        ("tar.zst", "zstd -T0", (1.0, 1.0), "tar -I 'zstd -T0'"),
        ("tar.gz", "pigz", (1.0, 0.9), "tar -I pigz"),
    ):
        pack = f"tar -I '{program}' -cf {{archive}} -C {tree} ."
        compared = bench.create(kind, pack)
        yield Row(f"archive.create {kind}, {both}{bench.sizes(kind)}", against, compared, aims[0])
        reader = f"tar -I {program.split()[0]}"
        compared = bench.extract(kind, f"{reader} -xf {{archive}} -C {{out}}")
        yield Row(f"archive.extract {kind}, {both}", reader, compared, aims[1])
    for kind, aims in (("zip", (1.5, 1.0)), ("7z", (0.9, 0.9))):
        pack = f"cd {tree} && 7zz a -bso0 -bsp0 -t{kind} {{archive}} ."
        compared = bench.create(kind, pack, rounds=SLOW)
        yield Row(f"archive.create {kind}, {both}{bench.sizes(kind)}", "7zz", compared, aims[0])
        unpack = "7zz x -bso0 -bsp0 -y -o{out} {archive}"
        yield Row(f"archive.extract {kind}, {both}", "7zz", bench.extract(kind, unpack, rounds=3), aims[1])


class _Bench:
    """Packs ``tree`` and unpacks what was packed, by the step and by others, in ``folder``."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.tree = tree
        self._folder = folder
        self._out = folder / "out"

    def extract(self, kind: str, command: str, *, rounds: int = ROUNDS) -> Comparison:
        """Unpack what others have packed."""
        archive = self._archive("theirs", kind)
        theirs = command.format(archive=archive, out=self._out)
        wish = {"from": str(archive), "to": str(self._out)}
        return compare(lambda: self._step("extract", wish), self._shell(theirs), rounds=rounds, before=self._clear)

    def create(self, kind: str, command: str, *, rounds: int = ROUNDS) -> Comparison:
        wish = {"from": str(self.tree), "to": str(self._archive("ours", kind)), "format": kind}
        theirs = self.theirs_create(kind, command)
        return compare(lambda: self._step("create", wish), theirs, rounds=rounds, before=self._clear)

    def theirs_create(self, kind: str, command: str) -> Callable[[], Usage]:
        archive = self._archive("theirs", kind)
        return self._shell(f"rm -f {archive} && {command.format(archive=archive)}")

    def sizes(self, kind: str) -> str:
        """How large the archives of both sides are, which were made just now."""
        ours, theirs = (self._archive(side, kind).stat().st_size for side in ("ours", "theirs"))
        return f" ({ours / 1e6:.0f} against {theirs / 1e6:.0f} MB)"

    def _archive(self, side: str, kind: str) -> Path:
        return self._folder / f"{side}.{kind}"

    def _shell(self, command: str) -> Callable[[], Usage]:
        return lambda: run(["sh", "-c", f"{command} && sync -f {self._folder}"])

    def _step(self, action: str, wish: dict[str, Any]) -> Usage:
        return run_step("archive", action, DEFAULTS[action] | wish)

    def _clear(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.mkdir()
        settle()
