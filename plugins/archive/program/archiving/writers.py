"""Packing, one function for each family of formats."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from backports import zstd

from archiving.source import Exactly, Found, Item

CHUNK = 1024 * 1024
LEVELS = {"zip": 6, "tar.gz": 6, "tar.xz": 6, "7z": 5, "tar.zst": 3}
"""The levels taken where none is given."""

OnBytes = Callable[[int], None]


@contextlib.contextmanager
def opened(item: Item, on_bytes: OnBytes) -> Iterator[Exactly | None]:
    """The content of a file; None where it has gone since it was listed."""
    try:
        source = Exactly(item.path, item.state.st_size, on_bytes)
    except FileNotFoundError:
        print(f"{item.name} was removed while the archive was made; it is not in it")
        yield None
        return
    with source:
        yield source
        if source.changed:
            print(f"{item.name} became shorter while the archive was made; its end in the archive is zeros")


def write(kind: str, found: Found, target: BinaryIO, level: int | None, on_bytes: OnBytes) -> None:
    """Pack ``found`` into ``target`` as ``kind``."""
    chosen = LEVELS.get(kind, 0) if level is None else level
    if kind == "zip":
        _write_zip(found, target, chosen, on_bytes)
    elif kind == "7z":
        _write_7z(found, target, chosen, on_bytes)
    else:
        with _compressing(kind, target, chosen) as stream:
            _write_tar(found, stream, on_bytes)


@contextlib.contextmanager
def _compressing(kind: str, target: BinaryIO, level: int) -> Iterator[BinaryIO]:
    match kind:
        case "tar":
            yield target
        case "tar.gz":
            # No name and no time in the header: the same content gives the same archive.
            with gzip.GzipFile("", "wb", compresslevel=level, fileobj=target, mtime=0) as stream:
                yield cast("BinaryIO", stream)
        case "tar.xz":
            with lzma.LZMAFile(target, "wb", preset=level) as stream:
                yield cast("BinaryIO", stream)
        case _:
            options = {
                int(zstd.CompressionParameter.compression_level): level,
                int(zstd.CompressionParameter.checksum_flag): 1,
            }
            with zstd.ZstdFile(target, "wb", options=options) as stream:
                yield cast("BinaryIO", stream)


def _write_tar(found: Found, target: BinaryIO, on_bytes: OnBytes) -> None:
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as archive:
        for item in found.items:
            info = tarfile.TarInfo(item.name)
            info.mode = item.state.st_mode & 0o777
            info.mtime = int(item.state.st_mtime)
            if item.is_directory:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif item.link is not None:
                info.type, info.linkname = tarfile.SYMTYPE, item.link
                archive.addfile(info)
            else:
                info.size = item.state.st_size
                with opened(item, on_bytes) as source:
                    if source is not None:
                        archive.addfile(info, io.BufferedReader(source, CHUNK))


def _write_zip(found: Found, target: BinaryIO, level: int, on_bytes: OnBytes) -> None:
    method = zipfile.ZIP_STORED if level == 0 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(target, "w", method, compresslevel=level or None) as archive:
        for item in found.items:
            # zip can't say a time before 1980 or after 2107.
            when = max(time.localtime(item.state.st_mtime)[:6], (1980, 1, 1, 0, 0, 0))
            info = zipfile.ZipInfo(
                item.name + ("/" if item.is_directory else ""), min(when, (2107, 12, 31, 23, 59, 59))
            )
            info.create_system = 3  # Unix: the mode below counts
            info.external_attr = item.state.st_mode << 16
            info.compress_type = method
            if item.is_directory:
                info.external_attr |= 0x10
                info.compress_type = zipfile.ZIP_STORED
                archive.writestr(info, b"")
            elif item.link is not None:
                archive.writestr(info, item.link.encode("utf-8", "surrogateescape"))
            else:
                info.file_size = item.state.st_size
                with opened(item, on_bytes) as source:
                    if source is not None:
                        with archive.open(info, "w") as sink:
                            while data := source.read(CHUNK):
                                sink.write(data)


def _write_7z(found: Found, target: BinaryIO, level: int, on_bytes: OnBytes) -> None:
    import py7zr  # takes a third of a second
    from py7zr.properties import FILTER_LZMA2

    filters = [{"id": FILTER_LZMA2, "preset": level}]
    with py7zr.SevenZipFile(target, "w", filters=filters) as archive:
        for item in found.items:
            if item.is_directory:
                archive.write(Path(item.path), item.name)
            elif item.link is not None:
                archive.writef(io.BytesIO(item.link.encode("utf-8", "surrogateescape")), item.name)
                _describe(archive.files.files_list[-1], item)
            else:
                with opened(item, on_bytes) as source:
                    if source is not None:
                        archive.writef(io.BufferedReader(source, CHUNK), item.name)
                        _describe(archive.files.files_list[-1], item)


def _describe(record: Any, item: Item) -> None:
    """Complete the record that py7zr's writef has just made: it knows nothing of a file but its content.

    (Any: py7zr does not export the type of its records.)
    """
    from py7zr.helpers import ArchiveTimestamp

    record["attributes"] = 0x8000 | 0x20 | item.state.st_mode << 16  # the Unix mode stands in the upper half
    record["lastwritetime"] = ArchiveTimestamp.from_datetime(item.state.st_mtime)
