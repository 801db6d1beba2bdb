"""How objects are to be written, and how the parts of an upload show whose they are."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from s3_transfer.api import Version
from s3_transfer.transport import CHUNK_BYTES

PART_BYTES = 64 * 1024**2
"""Large, because every part costs a request that both sides have to finish; none is ever held in memory."""
_MAX_PARTS = 10_000
_MARKS = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class Terms:
    """How objects are to be written."""

    headers: Mapping[str, str]
    """Storage class, encryption."""
    tags: Mapping[str, str]
    checksum: str | None
    """What the store is asked to check: an algorithm of ``checks.BEST``, "md5", or nothing."""
    checksum_optional: bool = False
    """Whether a store that refuses the checksum gets the object without."""
    overwrite: bool = True
    if_etag: str | None = None
    if_unchanged: bool = False
    """Whether an object has to be as it was listed."""
    customer_key: bytes | None = None
    writer: str = ""
    """Names the step of the run: all its attempts have the same, and nobody else has."""

    def condition(self, listed: Version | None) -> dict[str, str]:
        """The headers under which an object is only written if what is there is as the caller knows it. ``listed`` is
        what was there when it was looked at, if anything."""
        if self.if_etag is not None:
            return {"If-Match": f'"{self.if_etag}"'}
        if not self.overwrite or (self.if_unchanged and listed is None):
            return {"If-None-Match": "*"}
        if self.if_unchanged and listed is not None:
            return {"If-Match": '"' + listed.etag.strip('"') + '"'}
        return {}

    @property
    def encryption(self) -> str | None:
        """As ``Version.encryption`` says it; None if the caller leaves it to the store."""
        return "customer" if self.customer_key else self.headers.get("x-amz-server-side-encryption")

    def encrypted(self, version: Version) -> bool:
        """Whether what the store says of the object is the encryption that was asked for."""
        if self.encryption is None:
            return True
        asked = self.headers.get("x-amz-server-side-encryption-aws-kms-key-id")
        if asked and version.kms_key_id and "alias/" not in asked:  # which key an alias stands for, only the KMS knows
            return version.encryption == self.encryption and _short(asked) == _short(version.kms_key_id)
        return version.encryption == self.encryption

    def mark(self, key: str) -> int:
        """What the parts of an upload are shorter than the parts of others', see ``part_bytes``.

        Nothing that a store tells of an unfinished upload can be chosen by who begins it, but for the size of its
        parts. So it says whose it is, and with which wishes it was begun: only the step's next attempt goes on with
        it. Somebody else's may be alive, and would be completed or aborted under its hands.
        """
        customer = hashlib.sha256(self.customer_key).hexdigest() if self.customer_key else None
        wishes = [self.writer, key, sorted(self.headers.items()), sorted(self.tags.items()), self.checksum, customer]
        return int.from_bytes(hashlib.sha256(json.dumps(wishes).encode()).digest()[:8]) % _MARKS


def part_bytes(size: int, mark: int = 0) -> int | None:
    """How large the parts of a file of ``size`` bytes are, all but the last; None if it goes as a whole."""
    if size <= PART_BYTES:
        return None
    least = math.ceil(size / _MAX_PARTS)
    return max(PART_BYTES, math.ceil((least + _MARKS) / CHUNK_BYTES) * CHUNK_BYTES) - mark


def _short(key_id: str) -> str:
    """The key's id without the region and account that a store may put before it."""
    return re.split("[/:]", key_id)[-1]
