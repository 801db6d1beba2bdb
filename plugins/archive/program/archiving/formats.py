"""What kind of archive a file is, and the sentences for one that is broken."""

from __future__ import annotations

import contextlib
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator

from backports import zstd
from outrider_stepkit import StepFailure

from archiving.streams import ISAL_ERROR, Truncated, Undecodable
from archiving.tarhead import BadHeader
from archiving.volumes import Source, base_of

PASSWORD_ENV = "ARCHIVE_PASSWORD"  # noqa: S105  (the name of it)
SUFFIXES = {
    ".7z": "7z",
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".tar.bz2": "tar.bz2",
    ".tbz2": "tar.bz2",
    ".tar.xz": "tar.xz",
    ".txz": "tar.xz",
    ".tar.zst": "tar.zst",
    ".tzst": "tar.zst",
}
_MAGIC = (
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),  # an empty one
    (0, b"\x1f\x8b", "tar.gz"),
    (0, b"BZh", "tar.bz2"),
    (0, b"\xfd7zXZ\x00", "tar.xz"),
    (0, b"\x28\xb5\x2f\xfd", "tar.zst"),
    (257, b"ustar", "tar"),
)


class Damaged(StepFailure):
    """The archive ends too early or is not what it says it is."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path} is truncated or damaged: {why}; nothing was unpacked", code="archive_damaged")


def format_of(path: str, file: Source) -> str:
    """What the content says; what the name says where the content is silent (old tar has no mark)."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise Damaged(path, "the file is empty")
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    lower = base_of(path).lower()
    named = next((SUFFIXES[s] for s in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(s)), None)
    if named == "tar":
        return named
    if head[:4] in (b"PK\x07\x08", b"PK00"):
        raise StepFailure(
            f"{path} is a zip of several disks, which is not supported: join it with 'zip -s 0', or split it into"
            " .001, .002…",
            code="archive_unsupported",
        )
    if named is not None:
        raise Damaged(path, f"it is named like a {named} archive and its content is none")
    known = ", ".join(dict.fromkeys(SUFFIXES.values()))
    raise StepFailure(f"{path} is no archive that is known here ({known})", code="archive_unknown")


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
    """Errors of the decoders, in a sentence. For code that lets no OSError of a disk through but by ``to_disk``."""
    try:
        with reading(path):
            yield
    except Unwritable as error:
        raise error.reason from None
    except (zipfile.BadZipFile, zlib.error, ISAL_ERROR, lzma.LZMAError, zstd.ZstdError) as error:
        raise Damaged(path, str(error) or type(error).__name__) from error
    except (EOFError, OSError) as error:
        raise Damaged(path, str(error) or "it ends in the middle") from error
    except (NotImplementedError, RuntimeError) as error:
        raise StepFailure(f"{path} can't be unpacked: {error}", code="archive_unsupported") from error
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        raise Damaged(path, f"its structure makes no sense ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """What our own readers raise about an archive, in a sentence."""
    try:
        yield
    except Truncated as error:
        raise Damaged(path, str(error) or "it ends in the middle") from error
    except (BadHeader, Undecodable) as error:
        raise Damaged(path, str(error)) from error
