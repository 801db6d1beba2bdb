"""From an archive into a Tree, one function for each family of formats.

Whatever a decoder raises about the archive becomes one sentence here; what the Tree raises about the disk passes.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from backports import zstd
from outrider_stepkit import StepFailure

from archiving.formats import Damaged
from archiving.names import Parts, safe_parts, shown
from archiving.streams import CHUNK, Decompressing, Forward, Truncated
from archiving.tree import Tree

MAX_LINK_BYTES = 4096
_MAX_AFTER_END = 64 * 1024**2
_BLOCK = 512


class Unwritable(Exception):
    """Carries an OSError of the disk past the decoders, whose own errors are OSErrors in part."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


@contextlib.contextmanager
def to_disk() -> Iterator[None]:
    """What fails in here is the disk's fault, not the archive's."""
    try:
        yield
    except OSError as error:
        raise Unwritable(error) from error


@contextlib.contextmanager
def decoding(path: str) -> Iterator[None]:
    """Errors of the decoders, in a sentence."""
    try:
        yield
    except Unwritable as error:
        raise error.reason from None
    except (EOFError, Truncated) as error:
        raise Damaged(path, str(error) or "it ends in the middle") from error
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, zstd.ZstdError, OSError) as error:
        raise Damaged(path, str(error) or type(error).__name__) from error
    except (NotImplementedError, RuntimeError) as error:
        raise StepFailure(f"{path} can't be unpacked: {error}", code="archive_unsupported") from error
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        raise Damaged(path, f"its structure makes no sense ({type(error).__name__}: {error})") from error


def stripped(parts: Parts, count: int) -> Parts | None:
    """``parts`` without its first ``count`` folders; None for what is a folder that goes altogether."""
    if count == 0:
        return parts
    return parts[count:] or None


def read_tar(path: str, file: BinaryIO, kind: str, tree: Tree, strip: int) -> None:
    """tar, plain or compressed, read once from front to back."""
    compressed = None if kind == "tar" else Decompressing(file, kind)
    stream = Forward(file.read if compressed is None else compressed.read)
    with decoding(path):
        # errorlevel and extraction filters don't matter: tarfile only reads here, the Tree writes.
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:  # type: ignore[call-overload]  # Forward has all that is used
            while (member := archive.next()) is not None:
                _tar_member(archive, member, tree, strip)
                archive.members.clear()  # it would keep them all
            mark = archive.offset
        # A tar ends with blocks of zeros. tarfile takes anything else for the end, too, and would take half an archive.
        stream.seek(mark)
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise Truncated("the mark at its end is missing")
        if any(block):
            raise Truncated("it has something in its middle that is no header of a tar")
        # To the very end: only there stands the checksum of what is compressed.
        for _ in range(_MAX_AFTER_END // CHUNK):
            if not stream.read(CHUNK):
                return
    raise Damaged(path, "it goes on long after its end mark")


def _tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: Tree, strip: int) -> None:
    full = safe_parts(member.name, backslash=False)
    parts = stripped(full, strip)
    if parts is None:
        return
    if member.isdir():
        with to_disk():
            tree.directory(member.name, parts, member.mode, member.mtime)
    elif member.issym():
        with to_disk():
            tree.symlink(member.name, parts, member.linkname)
    elif member.islnk():
        target = stripped(safe_parts(member.linkname, backslash=False), strip)
        with to_disk():
            tree.hard_link(member.name, parts, member.linkname, target or ())
    elif member.isreg():
        source = archive.extractfile(member)
        assert source is not None
        with to_disk():
            sink = tree.file(member.name, parts, member.mode, member.mtime)
        with sink:
            left = member.size
            while left:
                data = source.read(min(CHUNK, left))
                if not data:
                    raise Truncated(f"it ends within {shown(member.name)}")
                left -= len(data)
                with to_disk():
                    sink.write(data)
    else:
        _refuse_special(member.name)


def read_zip(path: str, file: BinaryIO, tree: Tree, strip: int) -> None:
    """zip, by the directory at its end."""
    with decoding(path):
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise Truncated("its directory, which stands at the end of a zip, is missing") from error
        members = archive.infolist()
        tree.expect(sum(member.file_size for member in members), len(members))
        for member in members:
            _zip_member(archive, member, tree, strip)


def _zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, tree: Tree, strip: int) -> None:
    name = member.filename
    parts = stripped(safe_parts(name, backslash=True), strip)
    if parts is None:
        return
    if member.flag_bits & 1:
        raise StepFailure(
            f"the archive is encrypted: its entry {shown(name)} needs a password", code="archive_encrypted"
        )
    unix = member.external_attr >> 16
    kind, mode = stat.S_IFMT(unix), stat.S_IMODE(unix) or None
    mtime = None
    with contextlib.suppress(ValueError, OverflowError):
        mtime = time.mktime((*member.date_time, 0, 0, -1))
    if name.endswith(("/", "\\")) or kind == stat.S_IFDIR:
        with to_disk():
            tree.directory(name, parts, mode, mtime)
    elif kind == stat.S_IFLNK:
        if member.file_size > MAX_LINK_BYTES:
            raise Truncated(f"{shown(name)} is a link with a target of {member.file_size} bytes")
        target = archive.read(member).decode("utf-8", "surrogateescape")
        with to_disk():
            tree.symlink(name, parts, target)
    elif kind in (0, stat.S_IFREG):
        with archive.open(member) as source:
            with to_disk():
                sink = tree.file(name, parts, mode, mtime)
            with sink:
                while data := source.read(CHUNK):
                    with to_disk():
                        sink.write(data)
    else:
        _refuse_special(name)


class LinkTarget(io.BytesIO):
    """Collects the content of a symbolic link, which is its target."""

    def write(self, data: object) -> int:
        assert isinstance(data, bytes | bytearray)
        if self.tell() + len(data) > MAX_LINK_BYTES:
            raise Truncated("it has a link with an endless target")
        return super().write(data)


def _refuse_special(name: str) -> None:
    raise StepFailure(
        f"the archive is refused: its entry {shown(name)} is a device, a pipe or a socket", code="archive_unsafe"
    )
