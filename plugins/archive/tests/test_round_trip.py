"""What archive.create packs, archive.extract unpacks, in every format; and others' tools agree."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FORMATS = ("7z", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst")
Step = Callable[..., Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree with all that an archive can hold."""
    root = tmp_path / "source"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "none").mkdir()
    (root / "big.bin").write_bytes(os.urandom(700_000) + bytes(2_000_000))
    (root / "deep" / "er" / "ünï \\ code\n").write_text("names are bytes")
    (root / "empty").touch()
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "deep" / "link").symlink_to("../run.sh")
    os.utime(root / "run.sh", (1_700_000_000, 1_700_000_000))
    return root


def snapshot(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = (hashlib.sha256(path.read_bytes()).hexdigest(), oct(path.stat().st_mode & 0o777))
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_packed_comes_out_again(step: Step, source: Path, volume: Path, kind: str) -> None:
    if kind in ("zip", "7z"):  # there a backslash is a separator
        (source / "deep" / "er" / "ünï \\ code\n").rename(source / "deep" / "er" / "ünï code\n")
    archive = volume / f"arena.{kind}"
    packed = step("create", **{"from": str(source)}, to=str(archive), symlinks="keep")
    assert packed.code == 0, packed.stderr
    assert packed.outputs["format"] == kind
    assert packed.outputs["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert packed.outputs["bytes"] == archive.stat().st_size
    assert (packed.outputs["bytes"] < 1_500_000) == (kind != "tar")
    assert (packed.outputs["files"], packed.outputs["entries"], packed.outputs["skipped"]) == (4, 8, 0)

    unpacked = step("extract", **{"from": str(archive)}, to=str(volume / "out" / "arena"), symlinks="keep")
    assert unpacked.code == 0, unpacked.stderr
    assert snapshot(volume / "out" / "arena") == snapshot(source)
    assert (volume / "out" / "arena" / "run.sh").stat().st_mtime == 1_700_000_000
    assert unpacked.outputs == {
        "path": str(volume / "out" / "arena"),
        "format": kind,
        "entries": 8,
        "files": 4,
        "bytes": packed.outputs["source_bytes"],
        "skipped": 0,
    }
    assert sorted(os.listdir(volume / "out")) == ["arena"]
    last = unpacked.progress[-1]
    assert last["done"] == last["total"]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_other_tools_read_what_we_pack(step: Step, source: Path, volume: Path, kind: str) -> None:
    archive = volume / f"arena.{kind}"
    if kind == "zip":
        shutil.rmtree(source / "deep" / "er")
    assert step("create", **{"from": str(source)}, to=str(archive), symlinks="keep").code == 0
    if kind == "zip":
        with zipfile.ZipFile(archive) as opened:
            assert opened.testzip() is None
            assert opened.read("run.sh") == b"#!/bin/sh\n"
    else:
        listed = subprocess.run(["tar", "tf", str(archive)], capture_output=True, text=True, check=True).stdout
        assert "deep/link\n" in listed


@pytest.mark.parametrize("options", [(), ("--format=gnu",), ("--format=v7",), ("--format=pax", "--sparse")])
def test_what_gnu_tar_packs_is_unpacked(step: Step, source: Path, volume: Path, options: tuple[str, ...]) -> None:
    shutil.rmtree(source / "deep" / "er")
    os.truncate(source / "big.bin", 50_000_000)
    os.link(source / "run.sh", source / "same.sh")
    archive = volume / "a.tar"
    subprocess.run(["tar", "cf", str(archive), *options, "-C", str(source.parent), "source"], check=True)
    ended = step("extract", **{"from": str(archive)}, to=str(volume / "out"), symlinks="keep", strip_components=1)
    assert ended.code == 0, ended.stderr
    assert snapshot(volume / "out") == snapshot(source)


def test_concatenated_frames_are_one_stream(step: Step, source: Path, volume: Path) -> None:
    archive = volume / "a.tar"
    assert step("create", **{"from": str(source)}, to=str(archive), symlinks="keep").code == 0
    data = archive.read_bytes()
    import gzip

    (volume / "a.tar.gz").write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))
    assert step("extract", **{"from": str(volume / "a.tar.gz")}, to=str(volume / "out"), symlinks="keep").code == 0
    assert snapshot(volume / "out") == snapshot(source)


def test_content_tells_the_format_where_the_name_lies(step: Step, source: Path, volume: Path) -> None:
    archive = volume / "build.bin"
    assert step("create", **{"from": str(source)}, to=str(archive), symlinks="keep", format="tar.zst").code == 0
    assert (
        step("extract", **{"from": str(archive)}, to=str(volume / "out"), symlinks="keep").outputs["format"]
        == "tar.zst"
    )


def test_the_same_content_gives_the_same_archive(step: Step, source: Path, volume: Path) -> None:
    digests = {
        step("create", **{"from": str(source)}, to=str(volume / f"{number}.tar.gz"), symlinks="keep").outputs["sha256"]
        for number in range(2)
    }
    assert len(digests) == 1


def test_a_single_file_can_be_packed(step: Step, source: Path, volume: Path) -> None:
    assert step("create", **{"from": str(source / "run.sh")}, to=str(volume / "a.zip")).outputs["entries"] == 1
    assert step("extract", **{"from": str(volume / "a.zip")}, to=str(volume / "out"), symlinks="keep").code == 0
    assert os.listdir(volume / "out") == ["run.sh"]


def test_what_would_lead_out_is_left_out_and_counted(step: Step, source: Path, volume: Path) -> None:
    (source / "passwd").symlink_to("/etc/passwd")
    (source / "up").symlink_to("../volume")
    os.mkfifo(source / "pipe")
    ended = step("create", **{"from": str(source)}, to=str(volume / "a.tar"), symlinks="keep")
    assert ended.outputs["skipped"] == 3
    with tarfile.open(volume / "a.tar") as archive:
        assert not {"passwd", "up", "pipe"} & set(archive.getnames())


def test_an_archive_does_not_contain_itself(step: Step, source: Path) -> None:
    for _ in range(2):  # the second time the first one is there
        ended = step("create", **{"from": str(source)}, to=str(source / "backup.tar"), symlinks="keep")
        assert ended.outputs["entries"] == 8
    with tarfile.open(source / "backup.tar") as archive:
        assert not [name for name in archive.getnames() if "backup" in name or "outrider" in name]


def test_create_replaces_or_refuses_what_is_there(step: Step, source: Path, volume: Path) -> None:
    shutil.rmtree(source / "deep")
    target = volume / "a.zip"
    target.write_text("former")
    code, sentence = step("create", **{"from": str(source)}, to=str(target), existing="refuse").failure
    assert (code, target.read_text()) == ("exists", "former")
    assert str(target) in sentence
    assert step("create", **{"from": str(source)}, to=str(target), symlinks="keep").code == 0
    assert zipfile.is_zipfile(target)


def test_a_missing_source_is_said_and_leaves_nothing(step: Step, volume: Path) -> None:
    code, sentence = step("create", **{"from": "/none/such"}, to=str(volume / "a.zip")).failure
    assert code == "not_found"
    assert "/none/such does not exist" in sentence
    assert os.listdir(volume) == []
