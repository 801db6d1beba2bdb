"""From a 7z into a Tree. py7zr reads and vets the headers; 7zz decodes, and py7zr where there is no 7zz."""

from __future__ import annotations

import contextlib
import io
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from outrider_stepkit import StepFailure

from archiving import sevenzip
from archiving.choose import Choice
from archiving.formats import PASSWORD_ENV, Damaged, decoding, to_disk
from archiving.names import Parts, shown
from archiving.tarhead import BadHeader
from archiving.tree import Tree
from archiving.volumes import Source

MAX_LINK_BYTES = 4096


@dataclass(slots=True)
class Entry:
    """An entry of a 7z, vetted. ``kind`` is "directory", "link" or "file"; ``parts`` is None where it is left out."""

    member: Any  # py7zr's record, whose type it does not export
    name: str
    parts: Parts | None
    kind: str
    size: int
    checksum: int | None
    has_content: bool

    @property
    def mode(self) -> int | None:
        return self.member.posix_mode  # type: ignore[no-any-return]

    @property
    def mtime(self) -> float | None:
        when = self.member.lastwritetime
        return None if when is None else float(when.totimestamp())


def read_7z(source: Source, tree: Tree, choice: Choice, password: str | None) -> None:
    """Unpack what ``choice`` takes."""
    if sevenzip.program() is None:
        try:
            with _translated(source.path, password), decoding(source.path):
                from archiving.sevenpy import decode

                archive, entries = vetted(source, tree, choice, password)
                decode(archive, source, entries, tree)
        except Damaged as error:
            raise _perhaps_password(source.path, password, str(error)) from error
        return
    # Started before the headers are read: py7zr takes a third of a second to import, and 7zz waits at its pipe.
    contents = sevenzip.Contents(source.path, password)
    try:
        with _translated(source.path, password), decoding(source.path):
            _, entries = vetted(source, tree, choice, password)
        with decoding(source.path):
            for entry in entries:
                pieces = contents.entry(entry.name, entry.size, entry.checksum) if entry.has_content else iter(())
                _place(entry, tree, pieces)
            contents.finish()
    except StepFailure as error:
        raise contents.explained(error) from error
    finally:
        contents.close()


def vetted(source: Source, tree: Tree, choice: Choice, password: str | None) -> tuple[Any, list[Entry]]:
    """py7zr's archive, and its entries, each with its place; StepFailure where one is not to be unpacked."""
    import py7zr

    source.seek(0)
    archive = py7zr.SevenZipFile(io.BufferedReader(_Unclosed(source), 64 * 1024), password=password)
    members = list(getattr(archive, "files", ()))
    if archive.password_protected and password is None:
        raise py7zr.exceptions.PasswordRequired
    tree.expect(sum(member.uncompressed for member in members), len(members))
    names = [choice.full(member.filename, backslash=True) for member in members]
    # Some archivers mark a directory by nothing but what lies below it.
    parents = {parts[:depth] for parts in names for depth in range(1, len(parts))}
    entries = []
    for member, full in zip(members, names, strict=True):
        parts = choice.parts(member.filename, backslash=True)
        kind = "file"
        if member.is_junction or stat.S_IFMT(member.st_fmt or 0) not in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            raise StepFailure(
                f"the archive is refused: its entry {shown(member.filename)} is a device, a pipe or a socket",
                code="archive_unsafe",
            )
        if member.is_directory or (member.emptystream and full in parents):
            kind = "directory"
        elif member.is_symlink:
            kind = "link"
            if member.uncompressed > MAX_LINK_BYTES:
                raise BadHeader(f"{shown(member.filename)} is a link with an endless target")
        has_content = not member.emptystream
        if kind == "directory" and has_content:
            raise BadHeader(f"{shown(member.filename)} is a directory with content")
        entries.append(Entry(member, member.filename, parts, kind, member.uncompressed, member.crc32, has_content))
    return archive, entries


def _place(entry: Entry, tree: Tree, pieces: Iterator[memoryview]) -> None:
    if entry.parts is None:
        tree.passed_over(entry.size)
        for _ in pieces:
            pass
    elif entry.kind == "directory":
        with to_disk():
            tree.directory(entry.name, entry.parts, entry.mode, entry.mtime)
    elif entry.kind == "link":
        target = b"".join(bytes(piece) for piece in pieces)
        with to_disk():
            tree.symlink(entry.name, entry.parts, target.decode("utf-8", "surrogateescape"))
    else:
        with to_disk():
            sink = tree.file(entry.name, entry.parts, entry.mode, entry.mtime, entry.size)
        with sink:
            for piece in pieces:
                with to_disk():
                    sink.write(piece)


class _Unclosed(io.RawIOBase):
    """The source for somebody who would close it."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        return self._source.seek(position, whence)

    def tell(self) -> int:
        return self._source.tell()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        return self._source.readinto(buffer)


@contextlib.contextmanager
def _translated(path: str, password: str | None) -> Iterator[None]:
    """py7zr's errors in a sentence."""
    import py7zr
    import py7zr.exceptions

    try:
        yield
    except py7zr.exceptions.PasswordRequired as error:
        raise sevenzip.encrypted(path) from error
    except py7zr.exceptions.UnsupportedCompressionMethodError as error:
        raise StepFailure(
            f"{path} uses a compression that is not supported: {error}", code="archive_unsupported"
        ) from error
    except py7zr.exceptions.CrcError as error:
        why = f"a checksum does not match ({error.filename or 'in its data'})"
        raise _perhaps_password(path, password, why) from error
    except (py7zr.exceptions.ArchiveError, py7zr.Bad7zFile) as error:
        raise _perhaps_password(path, password, str(error) or "its structure makes no sense") from error
    except AssertionError as error:
        raise Damaged(path, "its structure makes no sense") from error


def _perhaps_password(path: str, password: str | None, why: str) -> StepFailure:
    if password is None:
        return Damaged(path, why)
    return StepFailure(
        f"{path} can't be decoded ({why}): it is damaged, or the password in {PASSWORD_ENV} is not its own",
        code="wrong_password",
    )
