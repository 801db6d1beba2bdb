"""Checksums: our own SHA-256 of every byte, and those that the store keeps of its objects."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

from outrider_stepkit import StepFailure

from s3_transfer.api import Version

BEST = ("sha256", "crc64nvme", "crc32c", "crc32", "sha1")
"""What is checked of several that a store has: the strongest, then the cheapest. All but the first run in passing."""


class Digest(Protocol):
    def update(self, data: Any, /) -> object: ...

    def digest(self) -> bytes: ...


class _Crc:
    def __init__(self, function: Callable[..., int], size: int) -> None:
        self._function, self._size, self._value = function, size, 0

    def update(self, data: Any, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._size, "big")


def digest_of(algorithm: str) -> Digest:
    """One of ``BEST``, or "md5"."""
    if algorithm.startswith("crc"):
        from awscrt import checksums  # 8 MiB of memory, which not every transfer needs

        return _Crc(getattr(checksums, algorithm), 8 if algorithm == "crc64nvme" else 4)
    return hashlib.new(algorithm, usedforsecurity=False)


def encoded(digest: bytes) -> str:
    """As it goes into a header."""
    return base64.b64encode(digest).decode()


def composite(algorithm: str, parts: list[bytes]) -> str:
    """The checksum of an object made of parts, from theirs: of the checksums one after another, and their number."""
    whole = digest_of(algorithm)
    whole.update(b"".join(parts))
    return f"{encoded(whole.digest())}-{len(parts)}"


def md5_of(version: Version) -> str | None:
    """The object's MD5 as hexadecimal, where its tag is that: not of parts, and not under a key of its own."""
    tag = version.etag.strip('"')
    plain = version.encryption in (None, "AES256")
    return tag.lower() if plain and re.fullmatch(r"[0-9a-fA-F]{32}", tag) else None


class Verifier:
    """Fed with the bytes of an object in their order; knows at their end whether they are what the store keeps.

    The SHA-256 is always taken. Beside it the best of the store's own checksums is, unless ``expected``, the SHA-256
    that the content has to have, makes that unnecessary. ``part_size`` is asked for the size of the object's parts
    where the checksum is one of parts.
    """

    def __init__(
        self, version: Version, *, expected: str | None, service: bool, part_size: Callable[[], int | None]
    ) -> None:
        self._sha256 = hashlib.sha256()
        self._wanted = ""
        self._algorithm = ""
        self._digest: Digest | None = None
        self._part_bytes: int | None = None
        self._in_part = 0
        self._parts: list[bytes] = []
        if expected is None and service:
            self._choose(version, part_size)

    def _choose(self, version: Version, part_size: Callable[[], int | None]) -> None:
        for algorithm in BEST:
            value = version.checksums.get(algorithm)
            if not value:
                continue
            _, dash, count = value.rpartition("-")
            if dash:
                size = part_size()
                if not size or math.ceil(version.size / size) != int(count):
                    continue  # parts of several sizes: their ends can't be known
                self._part_bytes = size
            self._begin(algorithm, value)
            return
        if md5 := md5_of(version):
            self._begin("md5", encoded(bytes.fromhex(md5)))

    def _begin(self, algorithm: str, wanted: str) -> None:
        self._algorithm, self._wanted, self._digest = algorithm, wanted, digest_of(algorithm)

    @property
    def checked(self) -> str | None:
        """The store's checksum that is compared, for people: "crc64nvme"."""
        return self._algorithm or None

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        if self._digest is None:
            return
        if self._part_bytes is None:
            self._digest.update(data)
            return
        view = memoryview(data)
        while view:
            piece = view[: self._part_bytes - self._in_part]
            self._digest.update(piece)
            self._in_part += len(piece)
            view = view[len(piece) :]
            if self._in_part == self._part_bytes:
                self._end_part()

    def _end_part(self) -> None:
        if self._digest is not None and self._in_part:
            self._parts.append(self._digest.digest())
            self._digest, self._in_part = digest_of(self._algorithm), 0

    def finish(self, what: str) -> str:
        """The SHA-256, as hexadecimal. Raises StepFailure if the store's checksum is another."""
        if self._digest is not None:
            self._end_part() if self._part_bytes else None
            found = composite(self._algorithm, self._parts) if self._part_bytes else encoded(self._digest.digest())
            if found != self._wanted:
                raise StepFailure(
                    f"{what} arrived damaged: its {self._algorithm.upper()} is not the one that the store keeps of it; "
                    "nothing was published",
                    code="damaged",
                    temporary=True,
                )
        return self._sha256.hexdigest()


def compare(what: str, digest: str, expected: str | None, consequence: str) -> None:
    """Raise StepFailure unless ``digest`` is the SHA-256 that the caller expects; ``consequence`` ends the sentence."""
    if expected is not None and digest != expected.lower():
        raise StepFailure(
            f"{what} has SHA-256 {digest}, not {expected.lower()}; {consequence}", code="checksum_mismatch"
        )
