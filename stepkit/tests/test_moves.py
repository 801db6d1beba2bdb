"""Publishing that takes several renames: begun and finished, or not begun, whatever comes in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from outrider_stepkit import staged_directory, uninterrupted
from outrider_stepkit.moves import JOURNAL, move_all
from outrider_stepkit.publish import STAGE_PREFIX, recover

STEPKIT = Path(__file__).parents[1]

OLD = {"a": "old", "d/f": "old", "e/f": "old", "keep": "old"}
NEW = {"a": "new", "d/f": "new", "d/g": "new", "n/x": "new"}
MOVES = ["a", "d/f", "d/g", "n"]
RENAMES = {"merge": 1 + len(MOVES), "replace": 1 + 4 + 3}
"""The first puts the journal in place. ``replace`` moves four names out and three in."""

ATTEMPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_moves
target, kind, at = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
test_moves.at_rename(at, lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
test_moves.publish(target, kind)
"""


class Gone(BaseException):
    """Raised by a signal's handler."""


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def read(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


def whole(kind: str) -> dict[str, str]:
    return NEW if kind == "replace" else OLD | NEW


def publish(target: Path, kind: str) -> None:
    with staged_directory(target) as stage:
        write(stage / "tree", NEW)
        if kind == "replace":
            move_all(stage, target, [(f"tree/{name}", name) for name in ("a", "d", "n")], former=os.listdir(target))
        else:
            move_all(stage, target, [(f"tree/{name}", name) for name in MOVES])


def at_rename(number: int, act: Callable[[], object], patch: Callable[[object, str, object], object]) -> None:
    """Have ``act`` done before the rename of this number."""
    made = [0]

    def counted(real: Callable[[str, str], None]) -> Callable[[str, str], None]:
        def rename(source: str, there: str) -> None:
            made[0] += 1
            if made[0] == number:
                act()
            real(source, there)

        return rename

    for name in ("rename", "replace"):
        patch(os, name, counted(getattr(os, name)))


def killed(target: Path, kind: str, number: int) -> None:
    command = [sys.executable, "-c", ATTEMPT, str(Path(__file__).parent), str(target), kind, str(number)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(STEPKIT)})
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "volume" / "target"
    write(path, OLD)
    return path


EVERY_RENAME = [(kind, number) for kind, count in RENAMES.items() for number in range(1, count + 1)]


@pytest.mark.parametrize(("kind", "number"), EVERY_RENAME)
def test_what_a_kill_cut_short_is_finished_by_the_next_attempt(target: Path, kind: str, number: int) -> None:
    killed(target, kind, number)
    recover(target)
    assert read(target) == (OLD if number == 1 else whole(kind))
    with staged_directory(target):
        pass
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize(("kind", "number"), EVERY_RENAME)
def test_cancellation_waits_until_all_is_moved(
    target: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    def cancel(_number: int, _frame: FrameType | None) -> None:
        raise Gone

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        at_rename(number, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch.setattr)
        with pytest.raises(Gone):
            publish(target, kind)
        assert signal.getsignal(signal.SIGTERM) is cancel
    finally:
        signal.signal(signal.SIGTERM, before)
    assert read(target) == whole(kind)
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("number", range(1, RENAMES["replace"] + 1))
def test_failing_replacement_puts_everything_back(target: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    at_rename(number, fail, monkeypatch.setattr)
    with pytest.raises(OSError, match="Input/output"):
        publish(target, "replace")
    assert read(target) == OLD
    assert os.listdir(target.parent) == ["target"]


def test_what_can_be_neither_moved_nor_put_back_stays_until_it_can(target: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(5, "Input/output error")

        def break_down() -> None:
            for name in ("rename", "replace"):
                patch.setattr(os, name, fail)
            fail()

        at_rename(4, break_down, patch.setattr)
        with pytest.raises(OSError, match="Input/output"):
            publish(target, "replace")
        with pytest.raises(OSError, match="Input/output"):
            recover(target)
    assert len(os.listdir(target.parent)) == 2
    recover(target)
    assert read(target) == NEW
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("number", [4, 7])
def test_replacement_is_finished_also_where_somebody_has_written_meanwhile(target: Path, number: int) -> None:
    killed(target, "replace", number)
    write(target, {"a/dir": "x", "n/y": "x", "d/z": "x"} if not (target / "a").exists() else {"n/y": "x"})
    recover(target)
    assert {name: content for name, content in read(target).items() if name in NEW} == NEW
    assert os.listdir(target.parent) == ["target"]


def test_merge_that_can_not_be_finished_is_given_up(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(target, "merge", 3)
    (target / "d" / "f").unlink()
    write(target, {"d/f/dir": "x"})
    recover(target)
    assert (target / "a").read_text() == "new"
    assert (target / "d" / "f" / "dir").read_text() == "x"
    assert "could not be finished" in capsys.readouterr().out
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize(
    "fields",
    [
        ("2", "merge", "../target", "in", "tree/a", "a"),
        ("1", "merge", "../other", "in", "tree/a", "a"),
        ("1", "merge", "../../elsewhere", "in", "tree/a", "a"),
        ("1", "merge", "../target", "in", "../target/keep", "a"),
        ("1", "merge", "../target", "in", "tree/a", "../escaped"),
        ("1", "merge", "../target", "in", "tree/a"),
        (),
    ],
)
def test_journal_that_is_not_ours_is_left_alone(target: Path, fields: tuple[str, ...]) -> None:
    stage = target.parent / f"{STAGE_PREFIX}target.0123456789ab"
    write(stage, {"tree/a": "new", JOURNAL: "".join(f"{field}\0" for field in fields)})
    recover(target)
    with staged_directory(target):
        pass
    assert read(target) == OLD
    assert (stage / "tree" / "a").exists()


def test_stage_without_a_journal_is_not_removed_by_who_only_recovers(target: Path) -> None:
    stage = target.parent / f"{STAGE_PREFIX}target.resume"
    stage.mkdir()
    recover(target)
    recover(target.parent / "none" / "such")
    assert stage.exists()


def test_names_of_any_bytes_are_moved(tmp_path: Path) -> None:
    name = os.fsdecode(b"line\nbreak\xff")
    (tmp_path / "target").mkdir()
    with staged_directory(tmp_path / "target") as stage:
        (stage / name).touch()
        move_all(stage, tmp_path / "target", [(name, name)])
    assert os.listdir(tmp_path / "target") == [name]


def test_other_threads_have_no_signals_to_hold_back() -> None:
    seen: list[bool] = []

    def run() -> None:
        with uninterrupted():
            seen.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [True]
