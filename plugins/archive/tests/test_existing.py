"""What happens when the target exists."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Step = Callable[..., Any]
Tar = Callable[..., Path]


@pytest.fixture
def archive(tar: Tar) -> Path:
    return tar(("version", b"2"), ("data/map", b"new"))


@pytest.fixture
def target(volume: Path) -> Path:
    path = volume / "arena"
    (path / "data").mkdir(parents=True)
    (path / "version").write_text("1")
    (path / "data" / "save").write_text("mine")
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*"))


def test_merge_replaces_what_it_brings_and_keeps_the_rest(step: Step, archive: Path, target: Path) -> None:
    for _ in range(2):  # a repeated step does no harm
        assert step("extract", **{"from": str(archive)}, to=str(target)).code == 0
        assert names(target) == ["data", "data/map", "data/save", "version"]
        assert (target / "version").read_text() == "2"
    assert os.listdir(target.parent) == ["arena"]


def test_replace_leaves_only_what_is_in_the_archive(step: Step, archive: Path, target: Path) -> None:
    assert step("extract", **{"from": str(archive)}, to=str(target), existing="replace").code == 0
    assert names(target) == ["data", "data/map", "version"]
    assert os.listdir(target.parent) == ["arena"]


def test_replace_needs_no_exchange_of_directories(
    step: Step, archive: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(left: Path, right: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(importlib.import_module("archiving.placing"), "swap", swap)
    assert step("extract", **{"from": str(archive)}, to=str(target), existing="replace").code == 0
    assert names(target) == ["data", "data/map", "version"]
    assert os.listdir(target.parent) == ["arena"]


def test_refuse_takes_only_an_empty_directory(step: Step, archive: Path, target: Path, volume: Path) -> None:
    code, sentence = step("extract", **{"from": str(archive)}, to=str(target), existing="refuse").failure
    assert code == "exists"
    assert f"{target} exists and is not empty" in sentence
    (volume / "empty").mkdir()
    assert step("extract", **{"from": str(archive)}, to=str(volume / "empty"), existing="refuse").code == 0
    assert names(volume / "empty") == ["data", "data/map", "version"]


@pytest.mark.parametrize("members", [[("version/x", b"")], [("data", b"")], [("new", b""), ("data/save/x", b"")]])
def test_merge_changes_nothing_where_kinds_differ(step: Step, tar: Tar, target: Path, members: list[Any]) -> None:
    code, sentence = step("extract", **{"from": str(tar(*members))}, to=str(target)).failure
    assert code == "merge_conflict"
    assert str(target) in sentence
    assert names(target) == ["data", "data/save", "version"]


def test_merge_does_not_write_through_a_link_that_a_game_has_left(
    step: Step, archive: Path, target: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (target / "data").rename(elsewhere)
    (target / "data").symlink_to(elsewhere)
    assert step("extract", **{"from": str(archive)}, to=str(target)).failure[0] == "merge_conflict"
    assert os.listdir(elsewhere) == ["save"]


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("/tmp")])
def test_file_or_link_in_place_of_the_target_is_refused(
    step: Step, archive: Path, volume: Path, make: Callable[[Path], Any]
) -> None:
    make(volume / "t")
    assert step("extract", **{"from": str(archive)}, to=str(volume / "t")).failure[0] == "not_a_directory"


def test_strip_components_drops_folders_and_what_has_no_more(step: Step, tar: Tar, volume: Path) -> None:
    archive = tar(("arena-2/readme", b""), ("arena-2/data/map", b""), ("loose", b""))
    ended = step("extract", **{"from": str(archive)}, to=str(volume / "t"), strip_components=1)
    assert names(volume / "t") == ["data", "data/map", "readme"]
    assert ended.outputs["files"] == 2
