"""Cancelled or killed while it is published: the old content or the new, never a mixture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import PROGRAM, STEPKIT

Prepare = Callable[..., Any]
Tar = Callable[..., Path]

INTERRUPTING = """
import os, runpy, signal, sys
program, root, number, name = sys.argv[1:5]
made = 0
def counted(real):
    def rename(*args, **more):
        global made
        made += 1
        if made == int(number):
            os.kill(os.getpid(), getattr(signal, name))
        real(*args, **more)
    return rename
os.rename, os.replace = counted(os.rename), counted(os.replace)
os.path.ismount = lambda path: os.fspath(path) == root
sys.argv = [program, *sys.argv[5:]]
runpy.run_path(program, run_name="__main__")
"""
"""Runs a program in which a signal comes before the rename of a number, and a path is the root of a volume."""

OLD = {"version": "1", "data/save": "mine", "data/map": "old", "logs/a": "old"}
NEW = {"version": "2", "data/map": "new", "data/more/map": "new", "readme": "new"}


@pytest.fixture
def interrupted(prepare: Prepare) -> Callable[..., int]:
    """Run a step with a signal before the rename of a number (0: without); its exit code."""

    def run(number: int, name: str, root: Path | None, command: str, **params: Any) -> int:
        args, envs, _ = prepare(command, **params)
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTING, str(PROGRAM / "__main__.py"), str(root), str(number), name, *args],
            env={**os.environ, **envs, "PYTHONPATH": f"{STEPKIT}:{PROGRAM}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=60,
        )
        return done.returncode

    return run


def read(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize(("existing", "root"), [("merge", False), ("merge", True), ("replace", True)])
def test_interrupted_extraction_leaves_old_or_new_content(
    interrupted: Callable[..., int], tar: Tar, volume: Path, existing: str, root: bool, name: str
) -> None:
    archive = tar(*((path, content.encode()) for path, content in NEW.items()))
    target = volume / "arena"
    whole = NEW if existing == "replace" else OLD | NEW
    wish = {"from": str(archive), "to": str(target), "existing": existing}
    mount = target if root else None
    seen = []
    for number in range(1, 20):
        subprocess.run(["rm", "-rf", str(target)], check=True)
        for path, content in OLD.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(content)
        code = interrupted(number, name, mount, "extract", **wish)
        if code == 0:
            break  # it has fewer renames
        if name == "SIGTERM":
            assert code == 143
            assert os.listdir(volume) == ["arena"]
        else:
            assert code == -signal.SIGKILL
            # The next attempt can be of another archive, which turns out to be none: it finishes what was begun.
            (archive.parent / "none.tar").write_text("none")
            assert interrupted(0, name, mount, "extract", **wish | {"from": str(archive.parent / "none.tar")}) == 1
        seen.append({path: content for path, content in read(target).items() if not path.startswith(".outrider")})
        assert seen[-1] in (OLD, whole)
        assert interrupted(0, name, mount, "extract", **wish) == 0
        assert read(target) == whole
        assert os.listdir(volume) == ["arena"]
    assert whole in seen


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_interrupted_volumes_are_of_the_old_archive_or_the_new(
    interrupted: Callable[..., int], tmp_path: Path, volume: Path, name: str
) -> None:
    source = tmp_path / "noise"
    source.write_bytes(os.urandom(200_000))
    wish = {"from": str(source), "to": str(volume / "a.tar"), "volume_size": 65536}
    old = {f"a.tar.{number:03}": b"old" for number in range(1, 7)}
    assert interrupted(0, name, None, "create", **wish) == 0
    new = {path.name: path.read_bytes() for path in volume.iterdir()}
    assert len(new) == 4
    seen = []
    for number in range(1, 20):
        for path in volume.iterdir():
            path.unlink()
        for file, content in old.items():
            (volume / file).write_bytes(content)
        code = interrupted(number, name, None, "create", **wish)
        if code == 0:
            break
        if name == "SIGKILL":
            # While it is not finished there is no archive that could be opened.
            first = volume / "a.tar.001"
            rest = {path.name: path.read_bytes() for path in volume.iterdir() if path.is_file()}
            assert not first.exists() or rest in (old, new)
            assert interrupted(0, name, None, "create", **wish | {"from": str(tmp_path / "none")}) == 1
            for left in volume.glob(".outrider-stage.*"):
                assert number == 1  # nothing was begun; it goes when something is staged
                subprocess.run(["rm", "-rf", str(left)], check=True)
        seen.append({path.name: path.read_bytes() for path in volume.iterdir()})
        assert seen[-1] in (old, new)
    assert new in seen
