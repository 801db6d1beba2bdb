"""What SQLite does not say of its files: that the end of its write-ahead log has rotted, or is not there any more.

SQLite reads its log up to the first frame with a wrong checksum and takes that for the end: a commit that a crash cut
off looks just like one that was on the disk. Two things tell them apart, for a database that is written with
``synchronous=FULL`` by one process at a time:

- What lies behind that frame (`damage_of_log`). A commit is synced before the next one is begun, so a crash cuts off
  one at most: two or more of them were on the disk.
- The `CommitMark`, a file that holds the number of the last commit which was on the disk. The database counts its
  commits, too: one that is behind its mark has lost some, however they went.

The format of the log: https://sqlite.org/fileformat2.html#the_write_ahead_log.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from array import array
from contextlib import suppress
from operator import mul
from pathlib import Path
from typing import BinaryIO

COMMITS = "PRAGMA application_id"
"""Tells how many commits a database counts. SQLite leaves this field of the file's header to whoever writes it; it is
part of the transaction, and needs neither a table nor a schema."""
MARK_SUFFIX = "-mark"

_HEADER_BYTES, _FRAME_BYTES = 32, 24
_LITTLE, _BIG = 0x377F0682, 0x377F0683  # how the words of the checksums are to be read
_VERSION = 3007000
_SUMS = struct.Struct(">2I")
_WORD = 0xFFFFFFFF
_COUNTS = 2**31  # the field is a signed integer of 32 bits; the count begins anew after this many
_COMMITS_OF_A_CRASH = 1


def damage_of_log(database: Path) -> str:
    """What is wrong with the write-ahead log of ``database``, as a sentence; "": nothing, or there is none.

    To be asked before SQLite opens the file: it throws away what it can't read. Raises OSError.
    """
    try:
        file = Path(f"{database}-wal").open("rb")  # noqa: SIM115 - the next line closes it
    except FileNotFoundError:
        return ""
    with file:
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            return ""  # it was just begun
        magic, version, page_bytes = struct.unpack(">3I", header[:12])
        swap = (magic == _LITTLE) != (sys.byteorder == "little")
        sums = _sum_up((0, 0), _words(header[:24], swap))
        if magic not in (_LITTLE, _BIG) or version != _VERSION or _SUMS.pack(*sums) != header[24:]:
            # A header is synced before its first frame is written, and too short to be torn.
            has_frames = os.fstat(file.fileno()).st_size > _HEADER_BYTES + _FRAME_BYTES
            return "the header of its write-ahead log is damaged" if has_frames else ""
        bad, lost = _behind_the_end(file, header[16:24], _FrameSums(page_bytes, swap, sums), page_bytes)
    if lost <= _COMMITS_OF_A_CRASH:
        return ""
    return f"its write-ahead log is damaged at frame {bad}: {lost} commits from there on can't be read"


def _behind_the_end(file: BinaryIO, salts: bytes, sums: _FrameSums, page_bytes: int) -> tuple[int, int]:
    """The first frame that SQLite would not read, and how many frames from there on end a commit.

    Frames of a former use of the file have other salts: each time that it is begun anew it gets new ones. What a
    transaction leaves that was undone has these, but ends no commit.
    """
    number, bad, lost = 0, 0, 0
    while len(frame := file.read(_FRAME_BYTES + page_bytes)) == _FRAME_BYTES + page_bytes:
        number += 1
        page, pages_after_commit = struct.unpack(">2I", frame[:8])
        is_current = frame[8:16] == salts
        if not bad and not (is_current and page and sums.go_on(frame)):
            bad = number
        if bad and is_current and pages_after_commit:
            lost += 1
    return bad, lost


class _FrameSums:
    """The running checksum of the frames, after ``sums`` of the header.

    `_sum_up` says what it is. Either sum is a linear form of the words and the sums before them, so for a frame two
    dot products do, a tenth of what a loop over its words costs.
    """

    def __init__(self, page_bytes: int, swap: bool, sums: tuple[int, int]) -> None:
        self._swap, self._sums = swap, sums
        first: list[int] = []
        second: list[int] = []
        a, b, c, d = 1, 0, 0, 1  # what the words after these make of the sums: s0, s1 = a*s0 + b*s1, c*s0 + d*s1
        for _ in range((page_bytes + 8) // 8):
            first += (b, a + b & _WORD)  # from the last word to the first
            second += (d, c + d & _WORD)
            a, b, c, d = a + b & _WORD, a + 2 * b & _WORD, c + d & _WORD, c + 2 * d & _WORD
        self._first, self._second, self._former = first[::-1], second[::-1], (a, b, c, d)

    def go_on(self, frame: bytes) -> bool:
        """Whether the frame's checksum is right; only then it counts."""
        words = _words(frame[:8] + frame[_FRAME_BYTES:], self._swap)
        (a, b, c, d), (s0, s1) = self._former, self._sums
        sums = (
            a * s0 + b * s1 + sum(map(mul, self._first, words)) & _WORD,
            c * s0 + d * s1 + sum(map(mul, self._second, words)) & _WORD,
        )
        if _SUMS.pack(*sums) != frame[16:24]:
            return False
        self._sums = sums
        return True


def _words(data: bytes, swap: bool) -> array[int]:
    words = array("I", data)
    if swap:
        words.byteswap()
    return words


def _sum_up(sums: tuple[int, int], words: array[int]) -> tuple[int, int]:
    s0, s1 = sums
    for x, y in zip(words[::2], words[1::2], strict=True):
        s0 = s0 + x + s1 & _WORD
        s1 = s1 + y + s0 & _WORD
    return s0, s1


class CommitMark:
    """Counts the commits of ``database``, in itself and in its mark. ``counted``: what the database says now.

    The mark is not synced, so that a commit costs no more: a power cut may set it back, and never is it ahead of what
    is on the disk.
    """

    def __init__(self, database: Path, counted: int) -> None:
        self._number = counted
        self._file = -1
        with suppress(OSError):  # a disk without room for it: damage is found by other ways, or later
            self._file = os.open(mark_of(database), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._write()

    @property
    def counting(self) -> str:
        """The statement that counts one commit more, as the last one of its transaction."""
        return f"{COMMITS} = {self._next()}"

    def committed(self) -> None:
        """That transaction is on the disk."""
        self._number = self._next()
        self._write()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _next(self) -> int:
        return (self._number + 1) % _COUNTS

    def _write(self) -> None:
        if self._file >= 0:
            with suppress(OSError):
                os.pwrite(self._file, _mark(self._number), 0)


def commits_lost(database: Path, counted: int) -> int:
    """How many commits ``database``, which counts ``counted``, is behind its mark. 0 also without one that is whole."""
    try:
        text = mark_of(database).read_bytes()
        number = int(text.split()[0])
    except (OSError, ValueError, IndexError):
        return 0
    if text != _mark(number):
        return 0
    lost = (number - counted) % _COUNTS
    return lost if lost < _COUNTS // 2 else 0


def mark_of(database: Path) -> Path:
    """Its mark. Without it nothing is compared."""
    return Path(f"{database}{MARK_SUFFIX}")


def _mark(number: int) -> bytes:
    text = b"%010d" % number
    return b"%s %08x\n" % (text, zlib.crc32(text))
