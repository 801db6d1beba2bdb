"""The parser of tar headers: what Python's tarfile writes, in every format, comes out; and no bytes make it fall."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

PROGRAM = str(Path(__file__).parents[1] / "program")


@pytest.fixture(scope="module")
def archiving() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, PROGRAM)
    try:
        yield {name: importlib.import_module(f"archiving.{name}") for name in ("tarhead", "tarread", "streams")}
    finally:
        sys.path.remove(PROGRAM)


def read(archiving: dict[str, ModuleType], data: bytes, piece: int = 1 << 20) -> list[tuple[Any, bytes]]:
    """All entries with their contents; pieces of ``piece`` bytes come in at a time."""
    source = io.BytesIO(data)
    stream = archiving["streams"].Incoming(lambda: source.read(piece))
    found = []
    for member in archiving["tarread"].members(stream):
        content = b"".join(bytes(part) for part in stream.pieces(member.size, member.name))
        stream.skip(-member.size % 512, member.name)
        found.append((member, content))
    return found


TEXT = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=("Cs",)), min_size=1, max_size=70)
NAMES = st.lists(TEXT.filter(lambda text: text not in (".", "..")), min_size=1, max_size=4).map("/".join)
MEMBERS = st.lists(
    st.tuples(
        NAMES,
        st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.AREGTYPE]),
        st.binary(max_size=2000),
        st.integers(0, 0o7777),
        st.one_of(st.integers(0, 8**12), st.floats(0, 1e9)),
        NAMES,
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    members=MEMBERS,
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    piece=st.sampled_from([100, 512, 700, 1 << 20]),
)
@example(members=[("a" * 70 + "/" + "b" * 60, tarfile.REGTYPE, b"x", 0o644, 8**11, "t")], form=0, piece=512)
def test_what_tarfile_writes_is_read(
    archiving: dict[str, ModuleType], members: list[Any], form: int, piece: int
) -> None:
    raw = io.BytesIO()
    written = []
    with tarfile.open(fileobj=raw, mode="w", format=form) as archive:
        for name, kind, content, mode, mtime, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime = kind, mode, mtime
            info.linkname = link if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content) if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
            with contextlib.suppress(ValueError):  # ustar has no room for it
                archive.addfile(info, io.BytesIO(content))
                written.append((info, content if info.size else b""))
    found = read(archiving, raw.getvalue(), piece)
    assert len(found) == len(written)
    for (member, content), (info, expected) in zip(found, written, strict=True):
        assert (member.name.rstrip("/"), member.link) == (info.name.rstrip("/"), info.linkname)
        assert member.mode == info.mode
        assert member.mtime == pytest.approx(info.mtime, abs=1)
        assert content == expected
        assert member.kind == (tarfile.REGTYPE if info.type == tarfile.AREGTYPE else info.type)


@settings(max_examples=150, deadline=None)
@given(
    name=NAMES,
    size=st.integers(0, 2**63),
    mode=st.integers(0, 0o777),
    mtime=st.integers(0, 2**40),
    link=st.none() | NAMES,
)
@example(name="é" * 100, size=8**11, mode=0o644, mtime=8**11, link=None)
def test_what_we_write_tarfile_reads(
    archiving: dict[str, ModuleType], name: str, size: int, mode: int, mtime: int, link: str | None
) -> None:
    kind = b"2" if link else b"0"
    head = archiving["tarhead"].header(name, kind, 0 if link else size, mode, mtime, link or "")
    with tarfile.open(fileobj=io.BytesIO(head + bytes(1024))) as archive:
        info = archive.next()
    assert info is not None
    assert (info.name, info.linkname, info.mode, info.mtime) == (name, link or "", mode, mtime)
    assert info.size == (0 if link else size)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_told_in_a_sentence(archiving: dict[str, ModuleType], data: st.DataObject) -> None:
    """Any bytes, and any change of good ones: an entry, or one of the two errors that say what is wrong."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("plain", "ü" * 80):
            info = tarfile.TarInfo(name)
            info.size = 700
            info.pax_headers = {"GNU.sparse.map": "0,700", "GNU.sparse.size": "700", "comment": "x"}
            archive.addfile(info, io.BytesIO(b"y" * 700))
    content = bytearray(raw.getvalue()[:6144])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=12))
    if data.draw(st.booleans()):
        # A right checksum lets the damage through to what comes after it.
        for start in range(0, len(content) - 512, 512):
            block = content[start : start + 512]
            if block[257:262] == b"ustar":
                total = sum(block[:148]) + 8 * 32 + sum(block[156:])
                content[start + 148 : start + 156] = b"%06o\0 " % total
    expected = (archiving["tarhead"].BadHeader, archiving["streams"].Truncated)
    with contextlib.suppress(expected):
        for member, _ in read(archiving, bytes(content)):
            assert member.size >= 0
            assert member.real_size >= 0


@settings(max_examples=200, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2000)), max_size=5),
    real_size=st.integers(0, 3000),
    size=st.integers(0, 3000),
)
def test_accepted_places_of_a_sparse_file_are_in_order_and_within_it(
    archiving: dict[str, ModuleType], places: list[tuple[int, int]], real_size: int, size: int
) -> None:
    tarhead = archiving["tarhead"]
    member = tarhead.Member("f", b"0", size, 0, 0.0, real_size=real_size, sparse=places)
    try:
        accepted = tarhead.check_sparse(member, size)
    except tarhead.BadHeader:
        return
    ends = [0] + [offset + length for offset, length in accepted]
    assert all(offset >= end for (offset, _), end in zip(accepted, ends, strict=False))
    assert max(ends) <= real_size
    assert sum(length for _, length in accepted) == size


def test_checksums_of_signed_bytes_are_taken(archiving: dict[str, ModuleType]) -> None:
    block = bytearray(archiving["tarhead"].header("x", b"0", 0, 0o644, 0))
    block[0] = 0xE9
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 256
    block[148:156] = b"%06o\0 " % signed
    assert archiving["tarhead"].checksum_fits(bytes(block))
    assert not archiving["tarhead"].checksum_fits(os.urandom(512))
