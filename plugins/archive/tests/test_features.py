"""What the parameters promise: choice of entries, links, permissions, passwords, volumes, reproducible archives."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import py7zr
import pytest

from .conftest import PROGRAM

FORMATS = ("7z", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst")
PASSWORD = {"ARCHIVE_PASSWORD": 'se cret"$x'}
Step = Callable[..., Any]
with_7zz = pytest.mark.skipif(shutil.which("7zz") is None, reason="7zz (Debian: 7zip) is not installed here")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("readme.txt", "maps/dm1.bsp", "maps/old/dm0.bsp", "maps/dm1.log", "logs/a.log", "bin/server"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 50)
    (root / "bin" / "server").chmod(0o775)
    (root / "maps").chmod(0o700)
    return root


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"include": ["maps"]}, ["maps/dm1.bsp", "maps/dm1.log", "maps/old/dm0.bsp"]),
        ({"include": ["*.bsp"], "exclude": ["old"]}, ["maps/dm1.bsp"]),
        ({"exclude": ["*.log", "/bin/", "maps/**/*.bsp"]}, ["readme.txt"]),
    ],
)
def test_include_and_exclude_choose_at_both_ends(
    step: Step, tree: Path, volume: Path, kind: str, choice: dict[str, Any], expected: list[str]
) -> None:
    whole, part = volume / f"whole.{kind}", volume / f"part.{kind}"
    assert step("create", **{"from": str(tree)}, to=str(whole)).code == 0
    assert step("extract", **{"from": str(whole)}, to=str(volume / "a"), **choice).code == 0
    assert names(volume / "a") == expected
    packed = step("create", **{"from": str(tree)}, to=str(part), **choice)
    assert packed.outputs["files"] == len(expected)
    assert step("extract", **{"from": str(part)}, to=str(volume / "b")).code == 0
    assert names(volume / "b") == expected


def test_a_pattern_that_is_none_is_said(step: Step, tree: Path, volume: Path) -> None:
    code, sentence = step("create", **{"from": str(tree)}, to=str(volume / "a.zip"), exclude=["a/../b"]).failure
    assert code == "bad_pattern"
    assert "'a/../b' is not a pattern" in sentence


@pytest.mark.parametrize("kind", FORMATS)
def test_symlinks_are_refused_unless_asked_for(step: Step, tree: Path, volume: Path, kind: str) -> None:
    (tree / "maps" / "link").symlink_to("../readme.txt")
    archive = volume / f"a.{kind}"
    code, sentence = step("create", **{"from": str(tree)}, to=str(archive)).failure
    assert code == "symlink"
    assert "'maps/link' to '../readme.txt': say symlinks: keep" in sentence
    assert step("create", **{"from": str(tree)}, to=str(archive), symlinks="skip").outputs["skipped"] == 1
    assert step("create", **{"from": str(tree)}, to=str(archive), symlinks="keep").outputs["skipped"] == 0
    code, sentence = step("extract", **{"from": str(archive)}, to=str(volume / "out")).failure
    assert code == "archive_symlink"
    assert "say symlinks: keep" in sentence
    assert not (volume / "out").exists()
    skipped = step("extract", **{"from": str(archive)}, to=str(volume / "out"), symlinks="skip")
    assert skipped.outputs["skipped"] == 1
    assert not (volume / "out" / "maps" / "link").is_symlink()
    assert step("extract", **{"from": str(archive)}, to=str(volume / "out"), symlinks="keep").code == 0
    assert os.readlink(volume / "out" / "maps" / "link") == "../readme.txt"


@pytest.mark.parametrize("kind", FORMATS)
def test_permissions_are_kept_or_plain(step: Step, tree: Path, volume: Path, kind: str) -> None:
    archive = volume / f"a.{kind}"
    assert step("create", **{"from": str(tree)}, to=str(archive)).code == 0
    for permissions, folder, program in (("keep", 0o700, 0o775), ("plain", 0o755, 0o755)):
        out = volume / permissions
        assert step("extract", **{"from": str(archive)}, to=str(out), permissions=permissions).code == 0
        assert (out / "maps").stat().st_mode & 0o777 == folder
        assert (out / "bin" / "server").stat().st_mode & 0o777 == program


@pytest.mark.parametrize("kind", ["7z", pytest.param("zip", marks=with_7zz)])
def test_encrypted_archives_open_with_their_password_alone(step: Step, tree: Path, volume: Path, kind: str) -> None:
    archive = volume / f"a.{kind}"
    packed = step("create", **{"from": str(tree)}, to=str(archive), encrypt=True, envs=PASSWORD)
    assert packed.code == 0, packed.stderr
    assert b"readme" not in archive.read_bytes() or kind == "zip"  # a zip does not hide its names
    code, sentence = step("extract", **{"from": str(archive)}, to=str(volume / "out")).failure
    assert code == "archive_encrypted"
    assert "ARCHIVE_PASSWORD" in sentence
    wrong = step("extract", **{"from": str(archive)}, to=str(volume / "out"), envs={"ARCHIVE_PASSWORD": "wrong"})
    assert wrong.failure[0] == "wrong_password"
    assert "wrong" not in wrong.failure[1].replace("wrong_password", "")
    assert os.listdir(volume) == [archive.name]
    assert step("extract", **{"from": str(archive)}, to=str(volume / "out"), envs=PASSWORD).code == 0
    assert names(volume / "out") == names(tree)


def test_password_is_in_no_argument_of_7zz(
    step: Step, tree: Path, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for 7zz writes down what everyone on the machine could see."""
    seen = tmp_path / "seen"
    stand_in = tmp_path / "bin" / "7zz"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {seen}\nenv >> {seen}\nexit 2\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    archive = volume / "a.7z"
    assert step("create", **{"from": str(tree)}, to=str(archive), encrypt=True, envs=PASSWORD).code == 1
    with py7zr.SevenZipFile(archive, "w", password=PASSWORD["ARCHIVE_PASSWORD"]) as made:
        made.writestr("x", "f")
    assert step("extract", **{"from": str(archive)}, to=str(volume / "out"), envs=PASSWORD).code == 1
    assert " a " in f" {seen.read_text()}"
    assert PASSWORD["ARCHIVE_PASSWORD"] not in seen.read_text()


@pytest.mark.parametrize("params", [{}, {"encrypt": True, "envs": PASSWORD}])
def test_7z_needs_no_7zz(
    step: Step, tree: Path, volume: Path, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    (tree / "link").symlink_to("readme.txt")
    monkeypatch.setenv("PATH", str(volume))
    archive = volume / "a.7z"
    packed = step("create", **{"from": str(tree)}, to=str(archive), symlinks="keep", **params)
    assert packed.code == 0, packed.stderr
    more = {"envs": params["envs"]} if params else {}
    opened = step("extract", **{"from": str(archive)}, to=str(volume / "out"), symlinks="keep", **more)
    assert opened.code == 0, opened.stderr
    assert names(volume / "out") == names(tree)
    assert (volume / "out" / "maps").stat().st_mode & 0o777 == 0o700
    assert opened.outputs["entries"] == packed.outputs["entries"]


@with_7zz
def test_7zz_and_py7zr_read_what_we_pack_and_each_other(step: Step, tree: Path, volume: Path) -> None:
    archive = volume / "a.7z"
    assert step("create", **{"from": str(tree)}, to=str(archive)).code == 0
    with py7zr.SevenZipFile(archive) as opened:
        assert set(names(tree)) <= set(opened.getnames())
        assert opened.testzip() is None
    subprocess.run(["7zz", "t", str(archive)], check=True, stdout=subprocess.DEVNULL)
    for kind in ("7z", "zip"):
        theirs = volume / f"theirs.{kind}"
        subprocess.run(["7zz", "a", "-bso0", str(theirs), "."], cwd=tree, check=True)
        assert step("extract", **{"from": str(theirs)}, to=str(volume / kind)).code == 0
        assert names(volume / kind) == names(tree)


@with_7zz
@pytest.mark.parametrize("method", ["Deflate64", "PPMd", "BZip2", "LZMA", "zstd"])
def test_zips_of_rarer_methods_are_read(step: Step, tree: Path, volume: Path, method: str) -> None:
    archive = volume / "a.zip"
    done = subprocess.run(["7zz", "a", "-bso0", f"-mm={method}", str(archive), "."], cwd=tree, stderr=subprocess.PIPE)
    if done.returncode:
        pytest.skip(f"this 7zz does not write {method}")
    ended = step("extract", **{"from": str(archive)}, to=str(volume / "out"))
    assert ended.code == 0, ended.stderr
    assert names(volume / "out") == names(tree)


@pytest.mark.parametrize("kind", FORMATS)
def test_volumes_are_cut_and_read(step: Step, tmp_path: Path, volume: Path, kind: str) -> None:
    source = tmp_path / "noise"
    source.write_bytes(os.urandom(300_000))
    archive = volume / f"a.{kind}"
    for number in range(6):  # what is left of a longer archive
        (volume / f"a.{kind}.{number + 1:03}").write_bytes(b"old")
    packed = step("create", **{"from": str(source)}, to=str(archive), volume_size="100kB".replace("kB", "KB"))
    assert packed.code == 0, packed.stderr
    files = sorted(volume.iterdir())
    assert packed.outputs["volumes"] == len(files) == 4
    assert [path.stat().st_size for path in files[:3]] == [100_000] * 3
    assert packed.outputs["path"] == str(files[0])
    joined = b"".join(path.read_bytes() for path in files)
    assert packed.outputs["sha256"] == hashlib.sha256(joined).hexdigest()
    opened = step("extract", **{"from": str(files[0])}, to=str(volume / "out"))
    assert opened.code == 0, opened.stderr
    assert (volume / "out" / "noise").read_bytes() == source.read_bytes()
    files[2].unlink()
    code, sentence = step("extract", **{"from": str(files[0])}, to=str(volume / "gap")).failure
    assert code == "archive_damaged"
    assert str(files[0]) in sentence


@pytest.mark.parametrize("kind", ["7z", pytest.param("zip", marks=with_7zz)])
def test_encrypted_volumes_are_read_and_a_missing_one_is_refused(
    step: Step, tree: Path, volume: Path, kind: str
) -> None:
    (tree / "noise").write_bytes(os.urandom(300_000))
    wish = {"encrypt": True, "envs": PASSWORD, "volume_size": 100_000}
    packed = step("create", **{"from": str(tree)}, to=str(volume / f"a.{kind}"), **wish)
    assert packed.code == 0, packed.stderr
    files = sorted(volume.iterdir())
    assert packed.outputs["volumes"] == len(files) == 4
    first = str(files[0])
    assert step("extract", **{"from": first}, to=str(volume / "out")).failure[0] == "archive_encrypted"
    opened = step("extract", **{"from": first}, to=str(volume / "out"), envs=PASSWORD)
    assert opened.code == 0, opened.stderr
    assert names(volume / "out") == names(tree)
    assert (volume / "out" / "noise").read_bytes() == (tree / "noise").read_bytes()
    for missing in (files[3], files[1]):
        missing.rename(volume.parent / missing.name)
        code, sentence = step("extract", **{"from": first}, to=str(volume / "gap"), envs=PASSWORD).failure
        assert code in ("archive_damaged", "wrong_password")  # what can't be decoded may be either
        assert first in sentence
        assert not (volume / "gap").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_reproducible_archives_do_not_depend_on_times_cores_or_place(
    step: Step, process: Step, tree: Path, volume: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "big").write_bytes(os.urandom(3_000_000) + bytes(9_000_000))
    digests = set()
    for number, run in enumerate((step, process)):
        for path in (tree, *tree.rglob("*")):
            os.utime(path, (number * 10**8 + 10**9, number * 10**8 + 10**9))
        before = os.sched_getaffinity(0)
        if number:
            os.sched_setaffinity(0, {min(before)})  # the process inherits one core
            monkeypatch.setenv("TZ", "Asia/Kolkata")
            tree = tree.rename(tree.with_name("elsewhere"))
        try:
            packed = run("create", **{"from": str(tree)}, to=str(volume / f"{number}.{kind}"), reproducible=True)
        finally:
            os.sched_setaffinity(0, before)
        assert packed.code == 0, packed.stderr
        digests.add(packed.outputs["sha256"])
    assert len(digests) == 1


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_level_is_readable(step: Step, tmp_path: Path, volume: Path, kind: str, level: int) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    (source / "data").write_bytes(os.urandom(1_200_000) + bytes(1_300_001))
    assert step("create", **{"from": str(source)}, to=str(volume / f"a.{kind}"), level=level).code == 0
    assert step("extract", **{"from": str(volume / f"a.{kind}")}, to=str(volume / "out")).code == 0
    assert (volume / "out" / "data").read_bytes() == (source / "data").read_bytes()


def test_zip_of_ours_satisfies_others(step: Step, tmp_path: Path, volume: Path) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    (source / "large ü").write_bytes(os.urandom(2_500_000) + bytes(2_000_000))
    (source / "small").write_text("x" * 1000)
    (source / "empty").touch()
    os.utime(source / "small", (1_700_000_000, 1_700_000_000))
    archive = volume / "a.zip"
    assert step("create", **{"from": str(source)}, to=str(archive)).code == 0
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        assert sorted(opened.namelist()) == ["empty", "large ü", "small"]
        assert opened.read("large ü") == (source / "large ü").read_bytes()
        assert opened.getinfo("small").date_time == time.localtime(1_700_000_000)[:6]
    if shutil.which("7zz"):
        subprocess.run(["7zz", "t", str(archive)], check=True, stdout=subprocess.DEVNULL)


def test_holes_of_a_sparse_file_stay_holes(step: Step, tmp_path: Path, volume: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "sparse").open("wb") as file:
        file.seek(40_000_000)
        file.write(b"x" * 100_000)
    for options in (["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.0"]):
        archive = tmp_path / "a.tar"
        subprocess.run(["tar", "cf", str(archive), "--sparse", *options, "-C", str(tree), "."], check=True)
        shutil.rmtree(volume / "out", ignore_errors=True)
        ended = step("extract", **{"from": str(archive)}, to=str(volume / "out"))
        assert ended.code == 0, ended.stderr
        assert (volume / "out" / "sparse").read_bytes() == (tree / "sparse").read_bytes()
        assert (volume / "out" / "sparse").stat().st_blocks * 512 < 5_000_000
        limited = step("extract", **{"from": str(archive)}, to=str(volume / "no"), max_bytes="10MB")
        assert limited.failure[0] == "archive_too_large"


@pytest.mark.parametrize("kind", ["7z", "zip", "tar.xz"])
def test_cancelled_packing_leaves_nothing(
    start: Callable[..., tuple[subprocess.Popen[str], Path]], tmp_path: Path, volume: Path, kind: str
) -> None:
    source = tmp_path / "noise"
    with source.open("wb") as file:
        for _ in range(8):
            file.write(os.urandom(1_000_000) * 16)
    process, directory = start("create", **{"from": str(source)}, to=str(volume / f"a.{kind}"), level=9)
    deadline = time.monotonic() + 60
    while not any(volume.glob(".outrider-stage.*/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert '"code": "cancelled"' in (directory / "progress").read_text()
    assert os.listdir(volume) == []


def test_xz_that_is_given_up_is_not_compressed_to_the_end_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAM))
    frames = importlib.import_module("archiving.frames")
    begun, steps = threading.Event(), []

    class Slow:
        def __init__(self, **_: Any) -> None:
            pass

        def compress(self, data: bytes) -> bytes:
            steps.append(len(data))
            begun.set()
            time.sleep(0.01)
            return b""

        def flush(self) -> bytes:
            return b""

    monkeypatch.setattr(frames.lzma, "LZMACompressor", Slow)
    packing = frames.compressor("tar.xz", io.BytesIO(), 6)
    packing.write(bytes(8 * 1024**2))
    assert begun.wait(10)
    packing.close()
    assert sum(steps) < 8 * 1024**2


def test_progress_is_in_bytes_with_a_rate(step: Step, tmp_path: Path, volume: Path) -> None:
    source = tmp_path / "noise"
    source.write_bytes(os.urandom(4_000_000))
    packed = step("create", **{"from": str(source)}, to=str(volume / "a.tar.xz"))
    last = packed.progress[-1]
    assert (last["done"], last["total"], last["unit"]) == (4_000_000, 4_000_000, "bytes")
    assert re.fullmatch(r"packing, [0-9.]+ [KMG]iB/s", last["message"])


def test_a_file_that_shrinks_is_filled_and_one_that_goes_is_left_out(
    step: Step, tree: Path, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A game at work: what was counted is another thing when it is packed."""
    from archiving import source

    def count(self: Any) -> Any:
        tally = original(self)
        (tree / "readme.txt").write_text("short")
        (tree / "logs" / "a.log").unlink()
        return tally

    original = source.Finder.count
    monkeypatch.setattr(source.Finder, "count", count)
    size = (tree / "readme.txt").stat().st_size
    assert step("create", **{"from": str(tree)}, to=str(volume / "a.tar")).code == 0
    with tarfile.open(volume / "a.tar") as opened:
        assert "logs/a.log" not in opened.getnames()
        content = opened.extractfile("readme.txt")
        assert content is not None
        assert content.read() == b"short" + bytes(size - 5)
