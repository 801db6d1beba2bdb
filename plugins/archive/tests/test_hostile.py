"""Archives that try to do harm, or are broken: one sentence, and the target as it was."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import signal
import stat
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import py7zr
import pytest
from backports import zstd

Step = Callable[..., Any]
Tar = Callable[..., Path]

FORMATS = ("7z", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst")
SYMLINK, HARDLINK = {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}


def refused(step: Step, archive: Path, volume: Path, **more: Any) -> tuple[str, str]:
    """Extract into an existing directory; give code and sentence; see that nothing changed anywhere."""
    target = volume / "target"
    target.mkdir(exist_ok=True)
    (target / "mine").write_text("kept")
    beside = sorted(os.listdir(volume))
    wish = {"symlinks": "keep", **more}
    failure: tuple[str, str] = step("extract", **{"from": str(archive)}, to=str(target), **wish).failure
    assert sorted(os.listdir(volume)) == beside
    assert os.listdir(target) == ["mine"]
    assert (target / "mine").read_text() == "kept"
    return failure


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("../evil", b"x")], "outside of the target"),
        ([("ok", b"x"), ("a/../../evil", b"x")], "outside of the target"),
        ([("a/../b", b"x")], "outside of the target"),
        ([("/etc/evil", b"x")], "absolute"),
        ([("l", {**SYMLINK, "linkname": "/etc"})], "absolute path '/etc'"),
        ([("l", {**SYMLINK, "linkname": ".."})], "leads out"),
        ([("a/b/l", {**SYMLINK, "linkname": "../../.."})], "leads out"),
        ([("l", {**SYMLINK, "linkname": "a/../.."})], "leads out"),
        # Each link by itself stays inside, if read as text; together they do not.
        ([("a/b/l", {**SYMLINK, "linkname": "../.."}), ("x", {**SYMLINK, "linkname": "a/b/l/.."})], "leads out"),
        ([("l", {**SYMLINK, "linkname": "."}), ("l/evil", b"x")], "below an entry that is a file or a link"),
        ([("f", b"x"), ("f/evil", b"x")], "below an entry that is a file or a link"),
        ([("d/f", b"x"), ("d", b"x")], "as a directory as well"),
        ([("h", {**HARDLINK, "linkname": "/etc/passwd"})], "absolute"),
        ([("h", {**HARDLINK, "linkname": "../mine"})], "outside of the target"),
        ([("h", {**HARDLINK, "linkname": "none/such"})], "which was not unpacked"),
        ([("l", {**SYMLINK, "linkname": "f"}), ("h", {**HARDLINK, "linkname": "l"})], "which is not a file"),
        ([("dev", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})], "a character device"),
        ([("pipe", {"type": tarfile.FIFOTYPE})], "a pipe"),
        ([("x" * 256, b"x")], "too long"),
    ],
)
def test_hostile_tar_is_refused(step: Step, tar: Tar, volume: Path, members: list[Any], words: str) -> None:
    code, sentence = refused(step, tar(*members), volume)
    assert code == "archive_unsafe"
    assert words in sentence


@pytest.mark.parametrize("name", ["../evil", "/evil", "..\\evil", "C:\\evil", "a/..\\..\\evil", "\\evil"])
def test_hostile_zip_is_refused(step: Step, tmp_path: Path, volume: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "x")
    assert refused(step, tmp_path / "a.zip", volume)[0] == "archive_unsafe"


def test_zip_link_and_device_are_judged_like_those_of_a_tar(step: Step, tmp_path: Path, volume: Path) -> None:
    for mode, content in ((stat.S_IFLNK, "/etc"), (stat.S_IFCHR, "")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            info = zipfile.ZipInfo("entry")
            info.create_system, info.external_attr = 3, (mode | 0o777) << 16
            archive.writestr(info, content)
        assert refused(step, tmp_path / "a.zip", volume)[0] == "archive_unsafe"


def hostile_7z(path: Path, name: str, content: bytes, mode: int = stat.S_IFREG | 0o644) -> Path:
    """py7zr does not write hostile names; so its record is changed after it has judged the name."""
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.writef(io.BytesIO(content), "harmless")
        archive.files.files_list[-1]["filename"] = name
        archive.files.files_list[-1]["attributes"] = 0x8000 | mode << 16
    return path


@pytest.mark.parametrize(
    ("name", "content", "mode"),
    [
        ("../evil", b"x", stat.S_IFREG | 0o644),
        ("/etc/evil", b"x", stat.S_IFREG | 0o644),
        ("..\\evil", b"x", stat.S_IFREG | 0o644),
        ("C:/evil", b"x", stat.S_IFREG | 0o644),
        ("link", b"/etc/passwd", stat.S_IFLNK | 0o777),
        ("link", b"../..", stat.S_IFLNK | 0o777),
        ("dev", b"x", stat.S_IFBLK | 0o777),
        ("pipe", b"x", stat.S_IFIFO | 0o777),
    ],
)
def test_hostile_7z_is_refused(step: Step, tmp_path: Path, volume: Path, name: str, content: bytes, mode: int) -> None:
    assert refused(step, hostile_7z(tmp_path / "a.7z", name, content, mode), volume)[0] == "archive_unsafe"


def packed(kind: str, path: Path, files: dict[str, bytes] | None = None) -> Path:
    """An archive of ``files``; if not given, a few, of which the last is long and does not compress."""
    files = files or {"a": b"a" * 5000, "b/c": os.urandom(300_000)}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    data = raw.getvalue()
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            for name, content in files.items():
                made.writestr(name, content)
    elif kind == "7z":
        with py7zr.SevenZipFile(path, "w") as seven:
            for name, content in files.items():
                seven.writestr(content, name)
    else:
        compressors: dict[str, Callable[[bytes], bytes]] = {
            "tar": bytes,
            "tar.gz": gzip.compress,
            "tar.bz2": bz2.compress,
            "tar.xz": lzma.compress,
            "tar.zst": zstd.compress,
        }
        path.write_bytes(compressors[kind](data))
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.9999])
def test_truncated_archive_publishes_nothing(step: Step, tmp_path: Path, volume: Path, kind: str, part: float) -> None:
    archive = packed(kind, tmp_path / f"a.{kind}")
    size = archive.stat().st_size
    # A tar ends in thousands of zeros that nobody needs: cut before its end mark.
    os.truncate(archive, min(int(size * part), size - 10240 if kind == "tar" else size - 1))
    code, sentence = refused(step, archive, volume)
    assert code == "archive_damaged"
    assert f"{archive} is truncated or damaged" in sentence


@pytest.mark.parametrize("kind", ["7z", "zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_flipped_bit_is_found_by_the_checksum(step: Step, tmp_path: Path, volume: Path, kind: str) -> None:
    archive = packed(kind, tmp_path / f"a.{kind}")
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    assert refused(step, archive, volume)[0] == "archive_damaged"


def test_tar_cut_between_two_members_is_not_taken_for_whole(step: Step, tmp_path: Path, tar: Tar, volume: Path) -> None:
    archive = tar(("a", b"x" * 512), ("b", b"y" * 512))
    os.truncate(archive, 1024)  # tarfile itself reads this without a complaint
    code, sentence = refused(step, archive, volume)
    assert code == "archive_damaged"
    assert "the mark at its end is missing" in sentence


@pytest.mark.parametrize("name", ["a.7z", "a.zip", "a.tar", "a.tar.gz", "a.rar"])
def test_something_else_is_said_to_be_no_archive(step: Step, tmp_path: Path, volume: Path, name: str) -> None:
    (tmp_path / name).write_text("<html>404 not found</html>" * 100)
    assert refused(step, tmp_path / name, volume)[0] in ("archive_damaged", "archive_unknown")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.zst", "7z"])
def test_bomb_stops_at_the_limit(step: Step, tmp_path: Path, volume: Path, kind: str) -> None:
    source = tmp_path / "zeros"
    with source.open("wb") as file:
        file.truncate(60_000_000)
    assert step("create", **{"from": str(source)}, to=str(tmp_path / f"bomb.{kind}"), level=1).code == 0
    code, sentence = refused(step, tmp_path / f"bomb.{kind}", volume, max_bytes="10MB")
    assert code == "archive_too_large"
    assert "10000000 bytes" in sentence


@pytest.mark.parametrize("kind", FORMATS)
def test_too_many_entries_are_refused(step: Step, tmp_path: Path, volume: Path, kind: str) -> None:
    archive = packed(kind, tmp_path / f"a.{kind}", {f"f{number}": b"x" for number in range(50)})
    assert step("extract", **{"from": str(archive)}, to=str(volume / "t"), max_entries=50).code == 0
    assert refused(step, archive, volume, max_entries=49)[0] == "archive_too_large"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("depth", [4, 200])  # and deeper than the default
def test_too_deep_an_entry_is_refused(step: Step, tmp_path: Path, volume: Path, kind: str, depth: int) -> None:
    archive = packed(kind, tmp_path / f"a.{kind}", {"d/" * depth + "f": b"x"})
    ended = step("extract", **{"from": str(archive)}, to=str(volume / "t"), max_depth=depth)
    assert ended.code == 0, ended.stderr
    assert (volume / "t" / ("d/" * depth) / "f").read_bytes() == b"x"
    code, sentence = refused(step, archive, volume, max_depth=depth - 1)
    assert code == "archive_too_large"
    assert f"lies {depth} folders deep and {depth - 1} are allowed" in sentence


@pytest.mark.parametrize("kind", FORMATS)
def test_as_deep_as_is_packed_is_unpacked_by_default(step: Step, tmp_path: Path, volume: Path, kind: str) -> None:
    source = tmp_path / "tree"
    (source / ("d/" * 128)).mkdir(parents=True)
    (source / ("d/" * 128) / "f").write_text("x")
    assert step("create", **{"from": str(source)}, to=str(tmp_path / f"a.{kind}")).code == 0
    ended = step("extract", **{"from": str(tmp_path / f"a.{kind}")}, to=str(volume / "t"))
    assert ended.code == 0, ended.stderr
    assert (volume / "t" / ("d/" * 128) / "f").read_text() == "x"


@pytest.mark.parametrize("kind", ["zip", "tar.zst", "7z"])
def test_ratio_is_limited(step: Step, tmp_path: Path, volume: Path, kind: str) -> None:
    source = tmp_path / "zeros"
    with source.open("wb") as file:
        file.truncate(60_000_000)
    assert step("create", **{"from": str(source)}, to=str(tmp_path / f"bomb.{kind}"), level=1).code == 0
    code, sentence = refused(step, tmp_path / f"bomb.{kind}", volume, max_ratio=30)
    assert code == "archive_too_large"
    assert "over 30 times its size" in sentence


def test_endless_header_does_not_eat_the_memory(step: Step, tmp_path: Path, volume: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 4 * 1024**3
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        file.write(info.tobuf())
        for _ in range(100):
            file.write(bytes(1024 * 1024))
    code, sentence = refused(step, tmp_path / "a.tar.gz", volume)
    assert code == "archive_damaged"
    assert "header of" in sentence


def test_encrypted_archives_are_named_as_such(step: Step, tmp_path: Path, volume: Path) -> None:
    with py7zr.SevenZipFile(tmp_path / "a.7z", "w", password="secret") as archive:
        archive.writestr(b"x", "f")
    assert refused(step, tmp_path / "a.7z", volume)[0] == "archive_encrypted"


def test_pipe_or_missing_file_in_place_of_the_archive(step: Step, tmp_path: Path, volume: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert refused(step, tmp_path / "a.tar", volume)[0] == "not_a_file"
    assert refused(step, tmp_path / "none.tar", volume)[0] == "not_found"
    assert refused(step, tmp_path, volume)[0] == "not_a_file"


def test_set_uid_is_dropped_and_what_is_unpacked_can_be_removed(step: Step, tar: Tar, volume: Path) -> None:
    members = [
        ("d", {"type": tarfile.DIRTYPE, "mode": 0o2000}),
        ("d/f", {"mode": 0o6555}),
        ("d/g", {**HARDLINK, "linkname": "d/f"}),
    ]
    assert step("extract", **{"from": str(tar(*members))}, to=str(volume / "t")).code == 0
    assert (volume / "t" / "d").stat().st_mode & 0o7777 == 0o700
    assert (volume / "t" / "d" / "f").stat().st_mode & 0o7777 == 0o755
    assert (volume / "t" / "d" / "f").samefile(volume / "t" / "d" / "g")


def test_later_entry_of_a_name_wins_and_does_not_write_through_a_link(step: Step, tar: Tar, volume: Path) -> None:
    archive = tar(("f", b"one"), ("l", {**SYMLINK, "linkname": "f"}), ("l", b"two"))
    assert step("extract", **{"from": str(archive)}, to=str(volume / "t"), symlinks="keep").code == 0
    assert ((volume / "t" / "f").read_text(), (volume / "t" / "l").read_text()) == ("one", "two")
    assert not (volume / "t" / "l").is_symlink()


def test_cancelled_extraction_leaves_nothing(
    start: Callable[..., tuple[subprocess.Popen[str], Path]], step: Step, tmp_path: Path, volume: Path
) -> None:
    source = tmp_path / "zeros"
    with source.open("wb") as file:
        file.truncate(600_000_000)
    assert step("create", **{"from": str(source)}, to=str(tmp_path / "a.tar.zst"), level=1).code == 0
    process, directory = start("extract", **{"from": str(tmp_path / "a.tar.zst")}, to=str(volume / "t"), max_ratio=1e6)
    deadline = time.monotonic() + 20
    while not os.listdir(volume) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.listdir(volume)[0].startswith(".outrider-stage.")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert '"code": "cancelled"' in (directory / "progress").read_text()
    assert os.listdir(volume) == []


def test_leftover_of_a_killed_attempt_is_removed_by_the_next(
    start: Callable[..., tuple[subprocess.Popen[str], Path]], step: Step, tmp_path: Path, volume: Path
) -> None:
    source = tmp_path / "zeros"
    with source.open("wb") as file:
        file.truncate(600_000_000)
    assert step("create", **{"from": str(source)}, to=str(tmp_path / "a.tar.zst"), level=1).code == 0
    process, _ = start("extract", **{"from": str(tmp_path / "a.tar.zst")}, to=str(volume / "t"), max_ratio=1e6)
    deadline = time.monotonic() + 20
    while not os.listdir(volume) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=20)
    assert len(os.listdir(volume)) == 1
    small = tmp_path / "small"
    small.write_text("x")
    assert step("create", **{"from": str(small)}, to=str(tmp_path / "b.zip")).code == 0
    assert step("extract", **{"from": str(tmp_path / "b.zip")}, to=str(volume / "t")).code == 0
    assert os.listdir(volume) == ["t"]
