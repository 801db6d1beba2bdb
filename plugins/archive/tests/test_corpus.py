"""Hostile archives after the known holes of tarfile, zipfile and py7zr: each is refused, and nothing is left.

Every case is named after what it is taken from. None of them needs the hole to be open in this Python: what is tried is
that our own reading refuses it, or unpacks it without harm.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import py7zr
import pytest

Step = Callable[..., Any]
Tar = Callable[..., Path]
SYM, LINK = {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}
LONG = "d" * 247
"""A folder's name so long that sixteen of them pass the kernel's limit for a path."""


def path_max_links() -> list[tuple[str, Any]]:
    """Short links stand for long folders, until the resolved path is too long for realpath, which then gives up."""
    members: list[tuple[str, Any]] = []
    where = ""
    for letter in "abcdefghijklmnop":
        members.append((f"{where}{LONG}", {"type": tarfile.DIRTYPE}))
        members.append((f"{where}{letter}", {**SYM, "linkname": LONG}))
        where += f"{letter}/"
    return members


TARS: dict[str, list[tuple[str, Any]]] = {
    "CVE-2007-4559 parent": [("../../evil", b"x")],
    "CVE-2007-4559 absolute": [("/tmp/outrider-evil", b"x")],
    "CVE-2001-1267 parent within": [("a/b/../../../evil", b"x")],
    "symlink, then through it": [("l", {**SYM, "linkname": "../.."}), ("l/evil", b"x")],
    "CVE-2025-4330 link to a link": [
        ("a", {"type": tarfile.DIRTYPE}),
        ("a/l", {**SYM, "linkname": ".."}),
        ("m", {**SYM, "linkname": "a/l/../.."}),
        ("m/evil", b"x"),
    ],
    "CVE-2025-4138 empty path": [("l", {**SYM, "linkname": ""}), ("l/../evil", b"x")],
    "CVE-2024-12718 modes outside": [("..", {"type": tarfile.DIRTYPE, "mode": 0o777})],
    "CVE-2025-4517 path too long for realpath": [
        *path_max_links(),
        (f"{'/'.join('abcdefghijklmnop')}/l", {**SYM, "linkname": "../" * 17 + "evil"}),
    ],
    "CVE-2025-4435 a link that was left out": [("l", {**SYM, "linkname": "/etc"}), ("l/passwd", b"x")],
    "CVE-2026-4360 hard link to a link": [("l", {**SYM, "linkname": "f"}), ("h", {**LINK, "linkname": "l"})],
    "hard link outside": [("h", {**LINK, "linkname": "/etc/passwd"}), ("h", b"x")],
    "hard link to itself": [("h", {**LINK, "linkname": "h"})],
    "device": [("sda", {"type": tarfile.BLKTYPE, "devmajor": 8})],
    "socket of no known kind": [("s", {"type": b"s"})],
}


@pytest.fixture
def harmless(step: Step, volume: Path, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Extract with everything allowed; give code and sentence; see that nothing came to lie anywhere."""

    def run(archive: Path, **more: Any) -> tuple[str, str]:
        (volume / "target").mkdir(exist_ok=True)
        before = sorted(path.name for path in tmp_path.iterdir())
        started = time.monotonic()
        wish = {"symlinks": "keep", **more}
        failure: tuple[str, str] = step("extract", **{"from": str(archive)}, to=str(volume / "target"), **wish).failure
        assert time.monotonic() - started < 30
        assert os.listdir(volume) == ["target"]
        assert os.listdir(volume / "target") == []
        after = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("outrider-"))
        assert after == [name for name in before if not name.startswith("outrider-")]
        return failure

    return run


@pytest.mark.parametrize("case", TARS)
def test_hostile_tar(harmless: Callable[..., tuple[str, str]], tar: Tar, case: str) -> None:
    assert harmless(tar(*TARS[case]))[0] in ("archive_unsafe", "archive_damaged", "archive_too_large")
    assert not Path("/tmp/outrider-evil").exists()


def raw_header(name: bytes = b"f", size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(block)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return raw_header(b"pax", b"%011o\0" % len(records), kind) + records + bytes(-len(records) % 512)


RAW_TARS = {
    "CVE-2025-8194 negative size": raw_header(size=b"\xff" * 11 + b"\xf0"),
    "CVE-2025-8194 negative octal": raw_header(size=b"-0000000100\0"),
    "underscores in a number": raw_header(size=b"0_0_0_0_100\0"),
    "CVE-2019-20907 pax length of nothing": pax(b"0 path=x\n"),
    "CVE-2019-20907 pax length too short": pax(b"3 path=xxxxxx\n"),
    "CVE-2024-6232 endless digits": pax(b"1" * 100_000),
    "CVE-2024-6232 many equal signs": pax(b"20 " + b"=" * 50_000),
    "pax size that is none": pax(b"11 size=-5\n") + raw_header(),
    "pax name with a zero": pax(b"13 path=a\0/b\n") + raw_header(),
    "pax name that leads out": pax(b"16 path=../evil\n") + raw_header(),
    "pax global name": pax(b"13 path=evil\n", b"g") + raw_header(),
    "pax sparse name that leads out": pax(b"27 GNU.sparse.name=../evil\n19 GNU.sparse.map=\n") + raw_header(),
    "GNU long name that leads out": raw_header(b"@", b"00000000010\0", b"L")
    + b"../evil\0".ljust(512, b"\0")
    + raw_header(),
    "GNU long name without an end": raw_header(b"@", b"77777777777\0", b"L") + bytes(1024),
    "a row of extended headers": pax(b"11 path=ab\n") * 100 + raw_header(),
    "sparse pieces that overlap": pax(b"30 GNU.sparse.map=0,512,0,512\n24 GNU.sparse.size=512\n")
    + raw_header(size=b"%011o\0" % 1024)
    + bytes(1024),
    "sparse pieces beyond the end": pax(b"26 GNU.sparse.map=999,512\n24 GNU.sparse.size=512\n")
    + raw_header(size=b"%011o\0" % 512)
    + bytes(512),
    "a sparse file of exabytes": pax(b"22 GNU.sparse.map=0,0\n36 GNU.sparse.size=9000000000000000000\n") + raw_header(),
    "wrong checksum": raw_header()[:200] + b"x" + raw_header()[201:],
}


@pytest.mark.parametrize("case", RAW_TARS)
def test_hostile_header(harmless: Callable[..., tuple[str, str]], tmp_path: Path, case: str) -> None:
    (tmp_path / "a.tar").write_bytes(RAW_TARS[case] + bytes(1024))
    assert harmless(tmp_path / "a.tar")[0] in ("archive_unsafe", "archive_damaged", "archive_too_large")


def test_plain_file_whose_long_name_ends_in_a_slash_brings_no_content(step: Step, tmp_path: Path, volume: Path) -> None:
    """tarfile took such an entry's content for the next header (gh-141707)."""
    evil = raw_header(b"../evil") + bytes(512)
    long_name = raw_header(b"@", b"00000000003\0", b"L") + b"d/\0".ljust(512, b"\0")
    body = raw_header(b"harmless", b"%011o\0" % len(evil), b"\0")
    (tmp_path / "a.tar").write_bytes(long_name + body + evil + bytes(1024))
    ended = step("extract", **{"from": str(tmp_path / "a.tar")}, to=str(volume / "target"))
    assert not (volume / "evil").exists()
    assert ended.code == 1


def overlapping_zip(path: Path, *, quoted: bool) -> Path:
    """Many entries, one content: all point to the same bytes, or each quotes the header of the next in its own."""
    content = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = content.compress(bytes(1_000_000)) + content.flush()
    crc = zlib.crc32(bytes(1_000_000))
    file = bytearray()
    offsets = []
    for number in range(50 if quoted else 1):
        offsets.append(len(file))
        name = b"%04d" % number
        file += struct.pack("<4sHHHLLLLHH", b"PK\3\4", 20, 0, 8, 0, crc, len(data), 1_000_000, len(name), 0) + name
    file += data
    start = len(file)
    for number in range(50):
        name = b"%04d" % (number if quoted else 0)
        offset = offsets[number] if quoted else 0
        packed = start - offset - 34 if quoted else len(data)
        file += struct.pack(
            "<4sHHHHLLLLHHHHHLL", b"PK\1\2", 20, 20, 0, 8, 0, crc, packed, 1_000_000, len(name), 0, 0, 0, 0, 0, offset
        )
        file += name
    file += struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 50, 50, len(file) - start, start, 0)
    path.write_bytes(file)
    return path


@pytest.mark.parametrize("quoted", [False, True], ids=["CVE-2019-9674 shared", "CVE-2024-0450 quoted"])
def test_overlapping_zip(harmless: Callable[..., tuple[str, str]], tmp_path: Path, quoted: bool) -> None:
    code, sentence = harmless(overlapping_zip(tmp_path / "a.zip", quoted=quoted))
    assert code == "archive_unsafe"
    assert "shares its place" in sentence


def changed_zip(path: Path, change: Callable[[bytearray], None], name: str = "name") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"x" * 1000)
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def other_name_in_place(data: bytearray) -> None:
    data[30:34] = b"evil"


def longer_than_it_says(data: bytearray) -> None:
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<L", 10)


def wrong_checksum(data: bytearray) -> None:
    at = data.index(b"PK\1\2")
    data[at + 16] ^= 1


def place_beyond_the_end(data: bytearray) -> None:
    at = data.index(b"PK\1\2")
    data[at + 42 : at + 46] = struct.pack("<L", 0x7FFFFFFF)


@pytest.mark.parametrize("change", [other_name_in_place, longer_than_it_says, wrong_checksum, place_beyond_the_end])
def test_zip_that_says_two_things(
    harmless: Callable[..., tuple[str, str]], tmp_path: Path, change: Callable[[bytearray], None]
) -> None:
    assert harmless(changed_zip(tmp_path / "a.zip", change))[0] in ("archive_unsafe", "archive_damaged")


def test_zip64_with_two_directories(harmless: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """CVE-2025-8291: the locator points to one directory, and what stands before it is another."""
    path = changed_zip(tmp_path / "a.zip", lambda data: None)
    data = path.read_bytes()
    end = data.index(b"PK\5\6")
    start = data.index(b"PK\1\2")
    record = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, end - start, start)
    last = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    good = data[:end] + record + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1) + last
    bad = data[:end] + record + struct.pack("<4sLQL", b"PK\6\7", 0, 7, 1) + last
    path.write_bytes(bad)
    assert harmless(path)[0] in ("archive_unsafe", "archive_damaged")
    path.write_bytes(good)
    with pytest.raises(AssertionError):  # the good one is unpacked
        harmless(path)


def test_names_that_stall_zipfile_are_harmless(step: Step, tmp_path: Path, volume: Path) -> None:
    """CVE-2024-8088: names of slashes alone sent zipfile.Path into an endless loop."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a//b///c", "x")
        archive.writestr("././/d", "x")
    assert step("extract", **{"from": str(tmp_path / "a.zip")}, to=str(volume / "target")).code == 0
    assert (volume / "target" / "a" / "b" / "c").read_text() == "x"


def seven(path: Path, *records: tuple[str, bytes, int]) -> Path:
    """A 7z whose names py7zr itself would not write."""
    with py7zr.SevenZipFile(path, "w") as archive:
        for number, (name, content, mode) in enumerate(records):
            archive.writef(io.BytesIO(content), f"harmless{number}")
            archive.files.files_list[-1]["filename"] = name
            archive.files.files_list[-1]["attributes"] = 0x8000 | mode << 16
    return path


FILE, SYMLINK = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
SEVENS: dict[str, list[tuple[str, bytes, int]]] = {
    "CVE-2022-44900 parent": [("../evil", b"x", FILE)],
    "CVE-2022-44900 not at the beginning": [("tmp/../../../evil", b"x", FILE)],
    "CVE-2022-44900 backslashes": [("..\\..\\evil", b"x", FILE)],
    "py7zr before 1.1.3: link, then through it": [("l", b"..", SYMLINK), ("l/evil", b"x", FILE)],
    "py7zr before 1.1.3: chain of links": [
        ("a/b/l", b"../..", SYMLINK),
        ("m", b"a/b/l/..", SYMLINK),
        ("m/evil", b"x", FILE),
    ],
    "link to an absolute path": [("l", b"/etc/passwd", SYMLINK)],
    "a file below a file": [("f", b"x", FILE), ("f/g", b"x", FILE)],
}


@pytest.mark.parametrize("case", SEVENS)
@pytest.mark.parametrize("with_7zz", [True, False])
def test_hostile_7z(
    harmless: Callable[..., tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    with_7zz: bool,
) -> None:
    archive = seven(tmp_path / "a.7z", *SEVENS[case])
    if not with_7zz:
        monkeypatch.setenv("PATH", "/none")
    assert harmless(archive)[0] == "archive_unsafe"


def test_7z_whose_content_differs_from_its_checksum(harmless: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    with py7zr.SevenZipFile(tmp_path / "a.7z", "w", filters=[{"id": py7zr.FILTER_COPY}]) as archive:
        archive.writestr(b"content " * 100, "f")
    data = bytearray((tmp_path / "a.7z").read_bytes())
    data[100] ^= 1
    (tmp_path / "a.7z").write_bytes(data)
    assert harmless(tmp_path / "a.7z")[0] == "archive_damaged"


def test_7z_bomb_is_stopped_by_its_ratio(
    harmless: Callable[..., tuple[str, str]], step: Step, tmp_path: Path, volume: Path
) -> None:
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(100_000_000)
    assert step("create", **{"from": str(tmp_path / "zeros")}, to=str(tmp_path / "a.7z"), level=1).code == 0
    code, sentence = harmless(tmp_path / "a.7z")
    assert code == "archive_too_large"
    assert "over 1000 times its size" in sentence
