"""Staging and publishing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path

import pytest
from outrider_stepkit import HashingReader, StepFailure, sha256_of, staged_directory, staged_file
from outrider_stepkit.publish import STAGE_PREFIX


def test_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "file"
    with staged_file(target) as file:
        file.write(b"content")
        assert not target.exists()
    assert target.read_bytes() == b"content"
    assert os.listdir(target.parent) == ["file"]


def test_failed_write_leaves_the_former_file_and_no_stage(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("former")
    with contextlib.suppress(KeyError), staged_file(target) as file:
        file.write(b"half")
        raise KeyError
    assert target.read_text() == "former"
    assert os.listdir(tmp_path) == ["file"]


def test_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match="is a directory"), staged_file(tmp_path):
        pass


def test_file_in_place_of_a_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StepFailure, match="is a file"), staged_file(tmp_path / "file" / "x"):
        pass


def test_stage_at_work_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    target = tmp_path / "file"
    dead = tmp_path / f"{STAGE_PREFIX}file.0123456789ab"
    dead.touch()
    other = tmp_path / f"{STAGE_PREFIX}file.x.0123456789ab"  # of a target "file.x"
    other.touch()
    with staged_file(target) as first:
        first.write(b"first")
        assert not dead.exists()
        with staged_file(target) as second:
            second.write(b"second")
    assert target.read_bytes() == b"first"
    assert other.exists()


def test_staged_directory_is_removed_whatever_its_modes(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), staged_directory(tmp_path / "target") as stage:
        (stage / "locked" / "in").mkdir(parents=True)
        (stage / "locked" / "in" / "f").touch()
        (stage / "locked" / "in").chmod(0o555)
        (stage / "locked").chmod(0o555)
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_names_of_full_length_can_be_staged(tmp_path: Path) -> None:
    name = "é" * 127
    with staged_file(tmp_path / name) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == [name]


def test_checksums(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "f").write_bytes(data)
    seen: list[int] = []
    assert sha256_of(tmp_path / "f", seen.append) == hashlib.sha256(data).hexdigest()
    assert seen[-1] == len(data)
    reader = HashingReader(io.BytesIO(data))
    assert reader.read(10) == data[:10]
    assert reader.hexdigest() == hashlib.sha256(data[:10]).hexdigest()
