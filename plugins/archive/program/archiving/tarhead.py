"""Headers of tar: ustar, GNU and pax, read and written.

The formats are those of POSIX.1-1988 and -2001 (`pax`) and of GNU tar's manual. Every number is checked before it is
used: no size is negative, no extended header is longer than it could sensibly be.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field

BLOCK = 512
MAX_EXTENSION = 1024 * 1024
"""Bytes of one extended header. Names have 3 KiB at most here; what else stands in it is not read."""
_MAX_SPARSE = 100_000
_SPACES = b" " * 8

REGULAR, HARDLINK, SYMLINK, DIRECTORY = b"0", b"1", b"2", b"5"
_SPECIAL = {b"3": "a character device", b"4": "a block device", b"6": "a pipe"}


class BadHeader(Exception):
    """A header that makes no sense. ``str()`` of it says why."""


@dataclass(slots=True)
class Member:
    """An entry of a tar.

    ``size`` is the number of bytes that follow in the archive, ``real_size`` that of the file. ``sparse`` are the
    places of a file that has holes: pairs of offset and length. ``kind`` is REGULAR, HARDLINK, SYMLINK or DIRECTORY,
    or the words for what can't be unpacked.
    """

    name: str
    kind: bytes | str
    size: int
    mode: int
    mtime: float
    link: str = ""
    real_size: int = 0
    sparse: list[tuple[int, int]] | None = None
    sparse_in_data: bool = False  # the map stands in front of the content (pax 1.0)

    @property
    def has_holes(self) -> bool:
        return self.sparse is not None or self.sparse_in_data


@dataclass(slots=True)
class Extensions:
    """What stands in extended headers and replaces or completes the next plain one."""

    name: bytes | None = None
    link: bytes | None = None
    records: dict[str, bytes] = field(default_factory=dict)
    sparse_0_0: list[bytes] = field(default_factory=list)


def checksum_fits(block: bytes) -> bool:
    """Whether the header's own sum is right.

    The sum of 256 bytes stays below Adler-32's modulus, so its lower half is that sum exactly, at the speed of C.
    """
    try:
        wanted = int(block[148:154], 8) if block[148:154].isdigit() else number(block[148:156])
    except (BadHeader, ValueError):
        return False
    if _sum(block[:148] + _SPACES + block[156:]) == wanted:
        return True
    # Some old archivers added signed bytes.
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:])
    return signed + 8 * 32 == wanted


def _sum(block: bytes) -> int:
    return (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2


def number(data: bytes) -> int:
    """A number field: octal digits, or base 256 with the first bit set (GNU). Never negative."""
    if (digits := data[:-1]).isdigit() and data[-1] in (0, 32):  # the usual form
        try:
            return int(digits, 8)
        except ValueError:
            raise BadHeader("it has something else in place of an octal number") from None
    if data[0] & 0x80:
        if data[0] == 0xFF or data[0] & 0x40:
            raise BadHeader("it has a negative number")
        return int.from_bytes(bytes([data[0] & 0x7F]) + data[1:], "big")
    digits = data.strip(b"\0 ")
    if not digits:
        return 0
    # int() would take signs, underscores and more.
    if not digits.isdigit():
        raise BadHeader("it has something else in place of a number")
    try:
        return int(digits, 8)
    except ValueError:
        raise BadHeader("it has something else in place of an octal number") from None


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def parse(block: bytes, more: Extensions | None) -> Member:
    """The entry that the plain header ``block`` is for. Its checksum was checked before."""
    kind = block[156:157]
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    link = block[157:257].partition(b"\0")[0] if block[157] else b""
    size = number(block[124:136])
    mode = number(block[100:108]) & 0o7777
    try:
        mtime = float(number(block[136:148]))
    except BadHeader:
        mtime = 0.0  # before 1970, as GNU tar writes it
    if more is not None:
        return _completed(block, kind, name, link, size, mode, mtime, more)
    if kind in (b"0", b"\0", b"7"):
        # Before ustar, a slash at the end was the sign of a directory.
        if name.endswith(b"/"):
            return Member(text(name), DIRECTORY, 0, mode, mtime)
        return Member(text(name), REGULAR, size, mode, mtime, real_size=size)
    return _other(block, kind, name, link, size, mode, mtime)


def _other(block: bytes, kind: bytes, name: bytes, link: bytes, size: int, mode: int, mtime: float) -> Member:
    if kind == b"S":
        return Member(
            text(name), REGULAR, size, mode, mtime, real_size=number(block[483:495]), sparse=gnu_sparse(block, 386, 4)
        )
    if kind in (HARDLINK, SYMLINK, DIRECTORY):
        return Member(text(name), kind, 0, mode, mtime, link=text(link))  # no data follows, whatever its size says
    words = _SPECIAL.get(kind)
    if words is None:
        raise BadHeader(f"it has an entry of the unknown kind {kind!r}")
    return Member(text(name), words, 0, mode, mtime)


def _completed(
    block: bytes, kind: bytes, name: bytes, link: bytes, size: int, mode: int, mtime: float, more: Extensions
) -> Member:
    records = more.records
    name = records.get("path", more.name if more.name is not None else name)
    link = records.get("linkpath", more.link if more.link is not None else link)
    if b"\0" in name or b"\0" in link:
        raise BadHeader("it has a zero byte in a name")
    if "size" in records:
        size = _decimal(records["size"])
    if "mtime" in records:
        mtime = _time(records["mtime"])
    if kind in (b"0", b"\0", b"7") and name.endswith(b"/"):
        return Member(text(name), DIRECTORY, 0, mode, mtime)
    if kind not in (b"0", b"\0", b"7"):
        return _other(block, kind, name, link, size, mode, mtime)
    member = Member(text(name), REGULAR, size, mode, mtime, real_size=size)
    if "GNU.sparse.name" in records:
        member.name = text(records["GNU.sparse.name"])
    if records.get("GNU.sparse.major") == b"1" and records.get("GNU.sparse.minor") == b"0":
        member.real_size, member.sparse_in_data = _decimal(records.get("GNU.sparse.realsize", b"")), True
    elif "GNU.sparse.map" in records:
        member.real_size = _decimal(records.get("GNU.sparse.size", b""))
        member.sparse = _pairs(records["GNU.sparse.map"].split(b","))
    elif more.sparse_0_0:
        member.real_size = _decimal(records.get("GNU.sparse.size", b""))
        member.sparse = _pairs(more.sparse_0_0)
    return member


def pax_records(data: bytes, more: Extensions, *, is_global: bool) -> None:
    """Take the records ``"LENGTH KEY=VALUE\\n"`` of a pax header into ``more``."""
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        if space < 0 or not data[position:space].isdigit():
            if not data[position:].strip(b"\0"):
                return
            raise BadHeader("it has an extended header that makes no sense")
        length = int(data[position:space])
        end = position + length
        record = data[space + 1 : end - 1]
        key, equals, value = record.partition(b"=")
        if end > len(data) or length < space - position + 3 or not equals or data[end - 1 : end] != b"\n":
            raise BadHeader("it has an extended header that makes no sense")
        keyword = key.decode("utf-8", "replace")
        if is_global:
            if keyword in ("path", "linkpath", "size") or keyword.startswith("GNU.sparse"):
                raise BadHeader(f"it has one {keyword} for all of its entries")
        elif keyword in ("GNU.sparse.offset", "GNU.sparse.numbytes"):
            more.sparse_0_0.append(value)
        more.records[keyword] = value
        position = end


def gnu_sparse(block: bytes, start: int, count: int) -> list[tuple[int, int]]:
    """The pairs of offset and length in a header of GNU's sparse format."""
    found = []
    for offset in range(start, start + 24 * count, 24):
        if not block[offset]:
            break
        found.append((number(block[offset : offset + 12]), number(block[offset + 12 : offset + 24])))
    return found


def check_sparse(member: Member, data_bytes: int) -> list[tuple[int, int]]:
    """The places of ``member``'s content, in order and within it, and as long as the ``data_bytes`` that follow."""
    end = total = 0
    places = member.sparse or []
    if len(places) > _MAX_SPARSE:
        raise BadHeader(f"it has a file in more than {_MAX_SPARSE} pieces")
    for offset, length in places:
        if offset < end or offset + length > member.real_size:
            raise BadHeader("it has a file with holes whose pieces overlap or lie beyond its end")
        end = offset + length
        total += length
    if total != data_bytes:
        raise BadHeader("it has a file with holes whose pieces are not as long as its content")
    return places


def sparse_map_of(values: list[bytes]) -> list[tuple[int, int]]:
    """Pairs out of a list of decimal numbers."""
    return _pairs(values)


def _pairs(values: list[bytes]) -> list[tuple[int, int]]:
    if len(values) % 2 or len(values) > 2 * _MAX_SPARSE:
        raise BadHeader("it has a file with holes whose map makes no sense")
    numbers = [_decimal(value) for value in values]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise BadHeader("it has something else in place of a number")
    return int(value)


def _time(value: bytes) -> float:
    if not re.fullmatch(rb"-?[0-9]{1,20}(\.[0-9]{0,20})?(e-?[0-9]{1,3})?", value):
        raise BadHeader("it has something else in place of a time")
    return float(value)


def header(name: str, kind: bytes, size: int, mode: int, mtime: int, link: str = "") -> bytes:
    """A header for ``name``: plain ustar where that holds it, else with a pax header in front of it."""
    raw, target = name.encode("utf-8", "surrogateescape"), link.encode("utf-8", "surrogateescape")
    plain = len(raw) <= 100 and len(target) <= 100 and raw.isascii() and target.isascii()
    if plain and size < 8**11 and 0 <= mtime < 8**11:
        return _ustar(raw, kind, size, mode, mtime, target)
    import tarfile  # seldom needed, and it takes a while

    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime, info.linkname = kind, size, mode, mtime, link
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _ustar(name: bytes, kind: bytes, size: int, mode: int, mtime: int, link: bytes) -> bytes:
    front = b"%b%07o\x000000000\x000000000\x00%011o\x00%011o\x00" % (name.ljust(100, b"\0"), mode, size, mtime)
    back = b"%b%bustar\x0000" % (kind, link.ljust(100, b"\0"))
    block = (front + _SPACES + back).ljust(BLOCK, b"\0")
    return b"%b%06o\x00 %b" % (front, _sum(block), block[156:])
