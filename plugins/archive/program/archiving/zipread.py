"""From a zip into a Tree. zipfile reads the directory; the content is read here, with isa-l, and nothing is trusted.

What a zip says twice must agree: readers differ in what they believe, and that is what attacks live by.
"""

from __future__ import annotations

import contextlib
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator

from isal import igzip_lib
from outrider_stepkit import StepFailure

from archiving.choose import Choice
from archiving.formats import to_disk
from archiving.names import Parts, shown
from archiving.streams import Truncated
from archiving.tarhead import BadHeader
from archiving.tree import Tree
from archiving.volumes import Source

MAX_LINK_BYTES = 4096
_CHUNK = 1024 * 1024
_ENCRYPTED, _UTF8 = 0x1, 0x800
_LOCAL = struct.Struct("<4s2xHH16xHH")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")


def members_of(source: Source) -> tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]:
    """The directory at the end of a zip, vetted: entries that overlap or are named twice in two ways are refused."""
    try:
        archive = zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise Truncated(f"its directory, which stands at the end of a zip, can't be read ({error})") from error
    _check_end(source, archive)
    members = archive.infolist()
    for member in members:
        if "\0" in member.orig_filename:
            raise _unsafe(member.orig_filename, "has a zero byte in its name")
    _check_places(members, archive.start_dir)
    return archive, members


def needs_other_tool(members: list[zipfile.ZipInfo]) -> str | None:
    """Why this reader can't have it, if it can't: "encrypted", or a method of compression."""
    if any(member.flag_bits & _ENCRYPTED for member in members):
        return "encrypted"
    known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    return next((f"method {member.compress_type}" for member in members if member.compress_type not in known), None)


def read_zip(
    source: Source, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], tree: Tree, choice: Choice
) -> None:
    """Unpack what ``choice`` takes."""
    for member in members:
        parts = choice.parts(member.filename, backslash=True)
        if parts is not None:
            pieces = _content(source, archive, member)
            place(member, parts, tree, pieces)


def place(member: zipfile.ZipInfo, parts: Parts, tree: Tree, pieces: Iterator[bytes | memoryview]) -> None:
    """Put one entry, whose content comes in ``pieces``, into the tree."""
    name = member.filename
    unix = member.external_attr >> 16
    kind, mode = stat.S_IFMT(unix), stat.S_IMODE(unix) or None
    mtime = None
    with contextlib.suppress(ValueError, OverflowError):
        mtime = time.mktime((*member.date_time, 0, 0, -1))
    if is_folder(member):
        with to_disk():
            tree.directory(name, parts, mode, mtime)
    elif kind == stat.S_IFLNK:
        target = b"".join(bytes(piece) for piece in pieces) if member.file_size <= MAX_LINK_BYTES else b""
        if not target:
            raise BadHeader(f"{shown(name)} is a link with a target of {member.file_size} bytes")
        with to_disk():
            tree.symlink(name, parts, target.decode("utf-8", "surrogateescape"))
    elif kind in (0, stat.S_IFREG):
        with to_disk():
            sink = tree.file(name, parts, mode, mtime, member.file_size)
        with sink:
            for piece in pieces:
                with to_disk():
                    sink.write(piece)
    else:
        raise _unsafe(name, "is a device, a pipe or a socket")


def is_folder(member: zipfile.ZipInfo) -> bool:
    return member.filename.endswith(("/", "\\")) or stat.S_IFMT(member.external_attr >> 16) == stat.S_IFDIR


def _content(source: Source, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes | memoryview]:
    """The content of an entry in pieces, its length and checksum verified at the end."""
    _seek_data(source, member)
    if member.compress_type == zipfile.ZIP_STORED:
        if member.compress_size != member.file_size:
            raise BadHeader(f"{shown(member.filename)} says two things about its size")
        pieces = _stored(source, member.file_size)
    elif member.compress_type == zipfile.ZIP_DEFLATED:
        pieces = _inflated(source, member)
    else:
        pieces = _with_zipfile(archive, member)
    left, checksum = member.file_size, 0
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise BadHeader(f"{shown(member.filename)} is longer than it says")
        checksum = zlib.crc32(piece, checksum)
        yield piece
    if left:
        raise Truncated(f"{shown(member.filename)} is shorter than it says")
    if checksum != member.CRC:
        raise BadHeader(f"the checksum of {shown(member.filename)} does not match")


def _seek_data(source: Source, member: zipfile.ZipInfo) -> None:
    """To the first byte of an entry's content; its own header must say what the directory says."""
    source.seek(member.header_offset)
    head = source.read(_LOCAL.size)
    if len(head) < _LOCAL.size:
        raise Truncated(f"it ends within {shown(member.filename)}")
    magic, flags, method, name_size, extra_size = _LOCAL.unpack(head)
    name = source.read(name_size)
    source.seek(extra_size, 1)
    decoded = name.decode("utf-8" if flags & _UTF8 else "cp437", "replace")
    if magic != b"PK\x03\x04" or decoded != member.orig_filename or method != member.compress_type:
        raise _unsafe(member.filename, "is another one in the directory than in its place")


def _stored(source: Source, size: int) -> Iterator[bytes]:
    while size:
        data = source.read(min(_CHUNK, size))
        if not data:
            return
        size -= len(data)
        yield data


def _inflated(source: Source, member: zipfile.ZipInfo) -> Iterator[bytes]:
    decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
    left, room = member.compress_size, member.file_size
    while not decoder.eof:
        data = b""
        if decoder.needs_input:
            data = source.read(min(_CHUNK, left))
            left -= len(data)
            if not data:
                raise Truncated(f"it ends within {shown(member.filename)}")
        # One byte more than there should be, so that what is too long is noticed.
        piece = decoder.decompress(data, min(_CHUNK, room + 1))
        room -= len(piece)
        if room < 0:
            raise BadHeader(f"{shown(member.filename)} is longer than it says")
        if piece:
            yield piece


def _with_zipfile(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(member) as opened:
        while data := opened.read(_CHUNK):
            yield data


def _check_places(members: list[zipfile.ZipInfo], directory: int) -> None:
    """Refuse entries that share bytes: so small files become endless ones (CVE-2019-9674, CVE-2024-0450)."""
    following = directory
    for member in sorted(members, key=lambda member: member.header_offset, reverse=True):
        # The local header has 30 bytes and the name at least.
        end = member.header_offset + 30 + len(member.orig_filename) + member.compress_size
        if member.header_offset < 0 or end > following:
            raise _unsafe(member.filename, "shares its place in the archive with another one")
        following = member.header_offset


def _check_end(source: Source, archive: zipfile.ZipFile) -> None:
    """Refuse a zip64 whose two pointers to its directory disagree (CVE-2025-8291)."""
    tail_size = min(source.size, _END.size + 65535 + _LOCATOR.size)
    source.seek(source.size - tail_size)
    tail = b""
    while len(tail) < tail_size and (data := source.read(tail_size - len(tail))):
        tail += data
    at = tail.rfind(b"PK\x05\x06")
    if at < _LOCATOR.size:
        return
    magic, _, offset, _ = _LOCATOR.unpack(tail[at - _LOCATOR.size : at])
    if magic != b"PK\x06\x07":
        return
    fields = _END.unpack(tail[at : at + _END.size])
    if 0xFFFF not in fields[1:5] and 0xFFFFFFFF not in fields[5:7]:
        return  # the plain directory counts, for everyone
    # What stands before the zip (a self-extractor) shifts all offsets by the same.
    shift = archive.start_dir - _directory_offset(source, source.size - tail_size + at)
    record = source.size - tail_size + at - _LOCATOR.size - 56
    if offset + shift != record:
        raise _unsafe("", "list of entries is pointed to in two ways")


def _directory_offset(source: Source, end: int) -> int:
    source.seek(end - _LOCATOR.size - 56)
    record = source.read(56)
    if len(record) < 56 or record[:4] != b"PK\x06\x06":
        raise BadHeader("its directory is not where it should be")
    return int.from_bytes(record[48:56], "little")


def _unsafe(name: str, why: str) -> StepFailure:
    entry = f"its entry {shown(name)}" if name else "its"
    return StepFailure(f"the archive is refused: {entry} {why}", code="archive_unsafe")
