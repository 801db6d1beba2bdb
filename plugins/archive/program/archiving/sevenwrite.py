"""Packing into a 7z, or an encrypted zip: with 7zz, and a 7z with py7zr where there is no 7zz."""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from outrider_stepkit import StepFailure

from archiving import sevenzip
from archiving.frames import cores
from archiving.names import check_name
from archiving.source import Item, content

_DICTIONARY_MB = {1: 1, 2: 1, 3: 4, 4: 4}
_LARGEST_MB = 8
"""An encoder of LZMA takes eleven times its dictionary, and a step program is to stay below 150 MB."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How to pack. ``kind`` is "7z" or "zip"."""

    kind: str
    level: int
    password: str | None
    times: bool = True


class Lists:
    """The names for 7zz: directories and the rest, each in a file of its own, beside a skeleton of the directories.

    7zz takes a directory that is named to it with all that is in it, which is more than was chosen. So it gets the
    directories from the skeleton, where they are empty, and then everything else by name.
    """

    def __init__(self, stage: Path) -> None:
        self.skeleton = stage / "skeleton"
        self.skeleton.mkdir()
        self.directories = stage / "directories"
        self.others = stage / "others"
        self.counts = [0, 0]

    def fill(self, items: Iterable[Item]) -> bool:
        """Write down ``items``; False if one of them has a name that 7zz can't be given in a list."""
        directories: list[tuple[Path, int, int]] = []
        with (
            self.directories.open("w", encoding="utf-8") as folders,
            self.others.open("w", encoding="utf-8") as others,
        ):
            for item in items:
                check_name(item.name)
                if not plain_name(item.name):
                    return False
                if item.is_directory:
                    path = self.skeleton / item.name
                    path.mkdir(parents=True)
                    directories.append((path, item.mode & 0o777, item.mtime))
                    folders.write(f"{item.name}\n")
                    self.counts[0] += 1
                else:
                    others.write(f"{item.name}\n")
                    self.counts[1] += 1
        for path, mode, mtime in reversed(directories):
            path.chmod(mode | 0o700)
            os.utime(path, (mtime, mtime))
        return True


def plain_name(name: str) -> bool:
    """Whether 7zz can be given the name in a list of names."""
    return not re.search(r'[\n\r"]', name) and name == name.strip() and "\ufeff" not in name


def write_with_7zz(
    source: Path, lists: Lists, archive: Path, wish: Wish, total: int, on_total: Callable[[int], None]
) -> None:
    """Pack what ``lists`` name, beneath ``source``, into the new file ``archive``."""
    if lists.counts[0]:
        _run(lists.skeleton, lists.directories, archive, wish, lambda part: None)
    if lists.counts[1] or not lists.counts[0]:
        _run(source, lists.others, archive, wish, lambda part: on_total(int(total * part)))


def _run(where: Path, names: Path, archive: Path, wish: Wish, on_part: Callable[[float], None]) -> None:
    command = [cast("str", sevenzip.program()), "a", f"-t{wish.kind}", *_switches(wish)]
    command += ["-spd", "-snl", "-scsUTF-8", "-bsp1", "-bso0", "-bb0", "-y", f"-i@{names}", str(archive)]
    if wish.password is not None:
        command.insert(2, "-p")
    with (names.parent / "messages").open("w+b") as messages:
        process = subprocess.Popen(
            command,
            cwd=where,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=sevenzip.environment(),
        )
        try:
            sevenzip.hand_over(process, wish.password, times=2)
            assert process.stdout is not None
            while data := os.read(process.stdout.fileno(), 4096):
                parts = re.findall(rb"([0-9]{1,3})%", data)
                if parts:
                    on_part(int(parts[-1]) / 100)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        messages.seek(0)
        text = messages.read(65536).decode("utf-8", "replace")
    # 1 is a warning: a file that was removed, or could not be read.
    if code == 1:
        print("7zz says: " + " ".join(text.split())[:500])
        if "denied" in text.lower():
            raise StepFailure("a file may not be read: " + " ".join(text.split())[:500], code="permission_denied")
    elif code:
        raise _failed(code, text)


def _failed(code: int, text: str) -> StepFailure:
    lower = text.lower()
    if "no space left" in lower or "disk quota" in lower:
        return StepFailure("the volume is full: there is no space left to write the archive", code="volume_full")
    if code in (8, -9) or "can't allocate" in lower:
        return StepFailure("7zz had too little memory: raise resources.memory", code="memory")
    return StepFailure(f"7zz ended with {code}: {' '.join(text.split())[:500]}", code="archiver_failed")


def _switches(wish: Wish) -> list[str]:
    if wish.kind == "zip":
        # Reproducible or not makes no difference to what is encrypted: its salt is random.
        return [f"-mx={wish.level}", "-mem=AES256", "-mcu=on", "-mtc=off", f"-mmt={min(cores(), 8)}"]
    level = wish.level
    switches = [f"-mx={level}", f"-mmt={2 if cores() > 1 else 1}", "-mtc=off", "-mta=off"]
    switches.append("-mtm=on" if wish.times else "-mtm=off")
    if level:
        dictionary = _DICTIONARY_MB.get(level, _LARGEST_MB)
        # With the block's size given, the result does not depend on the number of threads.
        switches.append(f"-m0=lzma2:d={dictionary}m:c={4 * dictionary}m")
    if wish.password is not None:
        switches.append("-mhe=on")
    return switches


def write_with_py7zr(items: Iterable[Item], file: BinaryIO, wish: Wish, on_bytes: Callable[[int], None]) -> None:
    """Pack ``items`` into ``file``: one core, and less than half of 7zz's speed."""
    import py7zr  # takes a third of a second
    from py7zr.properties import FILTER_CRYPTO_AES256_SHA256, FILTER_LZMA2

    filters = [{"id": FILTER_LZMA2, "preset": min(wish.level, 5)}]
    if wish.password is not None:
        filters.append({"id": FILTER_CRYPTO_AES256_SHA256})
    with py7zr.SevenZipFile(file, "w", filters=filters, password=wish.password) as archive:
        if wish.password is not None:
            archive.set_encrypted_header(True)
        for item in items:
            check_name(item.name)
            if item.is_directory:
                archive.write(Path("/"), item.name)  # any directory will do: it is described below
            elif item.link is not None:
                archive.writef(io.BytesIO(item.link.encode()), item.name)
            else:
                descriptor = item.open()
                if descriptor is None:
                    print(f"{item.name} was removed while the archive was made; it is not in it")
                    continue
                try:
                    archive.writef(io.BufferedReader(_Reader(item, descriptor, on_bytes), 1024 * 1024), item.name)
                finally:
                    os.close(descriptor)
            _describe(archive.files.files_list[-1], item, times=wish.times)


class _Reader(io.RawIOBase):
    """The content of a file, as py7zr asks for it: it wants to know the end beforehand."""

    def __init__(self, item: Item, descriptor: int, on_bytes: Callable[[int], None]) -> None:
        super().__init__()
        self._pieces = content(item, descriptor, on_bytes, 1024 * 1024)
        self._size = item.size
        self._rest = memoryview(b"")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = self._size if whence == 2 else position
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        self._position += size
        return size


def _describe(record: Any, item: Item, *, times: bool) -> None:
    """Complete the record that py7zr has just made: it knows nothing of the entry but its content.

    (Any: py7zr does not export the type of its records.)
    """
    from py7zr.helpers import ArchiveTimestamp

    windows = 0x10 if item.is_directory else 0x20
    record["attributes"] = 0x8000 | windows | item.mode << 16  # the Unix mode stands in the upper half
    if times:
        record["lastwritetime"] = ArchiveTimestamp.from_datetime(item.mtime)
    else:
        record.pop("lastwritetime", None)
