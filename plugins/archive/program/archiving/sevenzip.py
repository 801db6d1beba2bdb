"""From a 7z into a Tree. py7zr decodes; what is written, and where, is decided here."""

from __future__ import annotations

import io
import stat
from typing import BinaryIO

import py7zr
import py7zr.exceptions
from outrider_stepkit import StepFailure
from py7zr.io import MemIO, Py7zIO, WriterFactory

from archiving.formats import Damaged
from archiving.names import Parts, safe_parts, shown
from archiving.readers import LinkTarget, decoding, stripped, to_disk
from archiving.tree import Sink, Tree


class _Writer(Py7zIO):
    """A file of the archive on its way into the tree."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: bytes | bytearray) -> int:
        with to_disk():
            return self._sink.write(bytes(data))

    def read(self, size: int | None = None) -> bytes:
        raise io.UnsupportedOperation("write only")

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("write only")

    def seekable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def size(self) -> int:
        raise io.UnsupportedOperation("write only")

    def close(self) -> None:
        with to_disk():
            self._sink.close()


class _LinkWriter(_Writer):
    """A link of the archive: its content is its target, known when all of it has come."""

    def __init__(self, tree: Tree, name: str, parts: Parts) -> None:
        self._tree = tree
        self._name = name
        self._parts = parts
        self._target = LinkTarget()

    def write(self, data: bytes | bytearray) -> int:
        return self._target.write(data)

    def close(self) -> None:
        target = self._target.getvalue().decode("utf-8", "surrogateescape")
        with to_disk():
            self._tree.symlink(self._name, self._parts, target)


class _Writers(WriterFactory):
    """Makes each file when py7zr comes to it, so that only one is open at a time."""

    def __init__(self, tree: Tree, members: dict[str, tuple[py7zr.py7zr.ArchiveFile, Parts]]) -> None:
        self._tree = tree
        self._members = members

    def create(self, filename: str) -> Py7zIO:
        member, parts = self._members[filename]
        if member.is_symlink:
            return _LinkWriter(self._tree, member.filename, parts)
        with to_disk():
            return _Writer(self._tree.file(member.filename, parts, member.posix_mode, _mtime(member)))


def read_7z(path: str, file: BinaryIO, tree: Tree, strip: int) -> None:
    """7z, with whatever codecs py7zr knows."""
    try:
        with decoding(path):
            _read(file, tree, strip)
    except py7zr.exceptions.PasswordRequired as error:
        raise StepFailure(
            f"{path} is encrypted and can't be unpacked without its password", code="archive_encrypted"
        ) from error
    except py7zr.exceptions.UnsupportedCompressionMethodError as error:
        raise StepFailure(
            f"{path} uses a compression that is not supported: {error}", code="archive_unsupported"
        ) from error
    except py7zr.exceptions.CrcError as error:
        raise Damaged(path, f"a checksum does not match ({error.filename or 'in its data'})") from error
    except (py7zr.exceptions.ArchiveError, py7zr.Bad7zFile) as error:
        raise Damaged(path, str(error) or "its structure makes no sense") from error
    except AssertionError as error:
        raise Damaged(path, "its structure makes no sense") from error


def _read(file: BinaryIO, tree: Tree, strip: int) -> None:
    archive = py7zr.SevenZipFile(file)
    members = list(getattr(archive, "files", ()))
    if archive.password_protected:
        raise py7zr.exceptions.PasswordRequired
    tree.expect(sum(member.uncompressed for member in members), len(members))
    named = [(member, safe_parts(member.filename, backslash=True)) for member in members]
    # Some archivers mark a directory by nothing but what lies below it.
    parents = {parts[:depth] for _, parts in named for depth in range(1, len(parts))}
    writers: dict[str, tuple[py7zr.py7zr.ArchiveFile, Parts]] = {}
    factory = _Writers(tree, writers)
    for member, full in named:
        parts = stripped(full, strip)
        if parts is None:
            continue
        if member.is_junction or stat.S_IFMT(member.st_fmt or 0) not in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            raise StepFailure(
                f"the archive is refused: its entry {shown(member.filename)} is a device, a pipe or a socket",
                code="archive_unsafe",
            )
        if member.is_directory or (member.emptystream and full in parents):
            with to_disk():
                tree.directory(member.filename, parts, member.posix_mode, _mtime(member))
        else:
            # By number: py7zr would change names and give the second of two equal ones another.
            writers[str(member.id)] = (member, parts)
            archive.worker.register_filelike(member.id, MemIO(str(member.id), factory))
    archive.worker.extract(file, None, parallel=False)


def _mtime(member: py7zr.py7zr.ArchiveFile) -> float | None:
    when = member.lastwritetime
    return None if when is None else float(when.totimestamp())
