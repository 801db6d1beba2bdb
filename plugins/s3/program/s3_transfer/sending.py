"""Files into objects: in parts over several connections, none of which is sent a second time after a kill."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlencode

from outrider_stepkit import StepFailure
from outrider_stepkit.meter import Meter

from s3_transfer.api import Api, Part, Version
from s3_transfer.checks import Digest, compare, composite, digest_of, encoded
from s3_transfer.errors import Refused
from s3_transfer.transport import CHUNK_BYTES
from s3_transfer.workers import Workers

PART_BYTES = 64 * 1024**2
"""Large, because every part costs a request that both sides have to finish; none is ever held in memory."""
_MAX_PARTS = 10_000
_MAX_OBJECT_BYTES = 5 * 1024**4
_ABORT_S = 5.0
NOTHING_SENT = "nothing was sent"
_REFUSES_CHECKSUMS = frozenset({"NotImplemented", "InvalidArgument", "InvalidRequest", "UnsupportedHeader"})


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

    @property
    def condition(self) -> dict[str, str]:
        """The headers under which an object is only written if what is there is as the caller knows it."""
        if self.if_etag is not None:
            return {"If-Match": f'"{self.if_etag}"'}
        return {} if self.overwrite else {"If-None-Match": "*"}


@dataclass(slots=True)
class File:
    """A file to send, open. It is closed when nothing refers to it any more, which may be a thread left behind."""

    path: str
    key: str
    size: int
    stream: io.FileIO
    state: tuple[int, int, int]

    @classmethod
    def open(cls, path: str, key: str, size: int | None = None) -> File:
        """Open it. Raises StepFailure if it is no regular file, or not ``size`` bytes long."""
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            os.close(descriptor)
            raise StepFailure(f"{path} is not a file", code="not_a_file")
        file = cls(path, key, info.st_size, io.FileIO(descriptor), _state(info))
        if size is not None and info.st_size != size:
            raise file.changed()
        return file

    def pieces(self, offset: int, length: int) -> Iterator[bytes]:
        """A range of it, a chunk at a time. Raises StepFailure if it became shorter."""
        position, end = offset, offset + length
        while position < end:
            chunk = os.pread(self.stream.fileno(), min(CHUNK_BYTES, end - position), position)
            if not chunk:
                raise self.changed()
            yield chunk
            position += len(chunk)

    def digest(self, offset: int, length: int, *digests: Digest) -> None:
        """Feed a range of it to all of the digests."""
        for chunk in self.pieces(offset, length):
            for digest in digests:
                digest.update(chunk)

    def tag(self, part_bytes: int | None) -> str:
        """The tag that a store gives the object: its MD5, or that of its parts' with their number."""
        tags: list[bytes] = []
        step = part_bytes or max(self.size, 1)
        for offset in range(0, max(self.size, 1), step):
            md5 = hashlib.md5(usedforsecurity=False)
            self.digest(offset, min(step, self.size - offset), md5)
            tags.append(md5.digest())
        if part_bytes is None:
            return tags[0].hex()
        return f"{hashlib.md5(b''.join(tags), usedforsecurity=False).hexdigest()}-{len(tags)}"

    def unchanged(self) -> None:
        """Raise StepFailure if it was written to since it was opened: what was sent may be half old, half new."""
        if _state(os.fstat(self.stream.fileno())) != self.state:
            raise self.changed()

    def changed(self) -> StepFailure:
        return StepFailure(
            f"{self.path} was changed while it was being sent: stop what writes to it first", code="changed"
        )


def _state(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


@dataclass(frozen=True, slots=True)
class Sent:
    """An object as it was written."""

    sha256: str
    version: Version


@dataclass(slots=True)
class Sender:
    """Writes objects. ``meter`` counts what has arrived."""

    api: Api
    terms: Terms
    workers: Workers
    meter: Meter
    connections: int
    checksum: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.checksum = self.terms.checksum

    @staticmethod
    def part_bytes(size: int) -> int | None:
        """How large the parts of a file of ``size`` bytes are; None if it goes as a whole."""
        if size <= PART_BYTES:
            return None
        return max(PART_BYTES, math.ceil(size / (_MAX_PARTS * CHUNK_BYTES)) * CHUNK_BYTES)

    # -- a file of one request ---------------------------------------------------------------------------------------

    def put(self, path: str, key: str, size: int, expected: str | None = None) -> Sent:
        """Send a file of one part. ``expected`` is its SHA-256, if that is known."""
        file = File.open(path, key, size)
        sha256, other = hashlib.sha256(), digest_of(self.checksum) if self.checksum else None
        file.digest(0, size, sha256, *([other] if other else []))
        compare(path, sha256.hexdigest(), expected, NOTHING_SENT)
        written: list[Version] = []

        def attempt() -> None:
            headers = {
                "Content-Length": str(size),
                "Content-Type": "application/octet-stream",
                **self.terms.headers,
                **self._tagging(),
                **self.terms.condition,
            }
            if other is not None and self.checksum:
                headers |= _checksum_headers(self.checksum, other)
            digest = None if self.api.settings.secure else sha256.hexdigest()
            with self._body(file, 0, size) as body:
                version, _ = self.api.put(key, body, headers, sha256=digest)
            written[:] = [version]

        self._carefully(attempt, key, lambda: self._is_ours(file, sha256.hexdigest()), written)
        file.unchanged()
        return Sent(sha256.hexdigest(), written[0])

    # -- a file of many ----------------------------------------------------------------------------------------------

    def send(self, file: File, expected: str | None = None) -> Sent:
        """Send a file of several parts; what an attempt before this one has sent of it is not sent again."""
        if file.size > _MAX_OBJECT_BYTES:
            raise StepFailure(f"{file.path} is larger than the 5 TiB that an object can have", code="too_large")
        size = self.part_bytes(file.size) or PART_BYTES
        upload_id, there = self._begun(file.key)
        if upload_id is None:
            upload_id = self._begin(file.key)
        try:
            return self._send_parts(file, upload_id, size, there, expected)
        except StepFailure as failure:
            if not failure.temporary or failure.code in {"changed", "damaged"}:
                self._abort(file.key, upload_id)
            raise  # after a temporary one, the next attempt goes on with what is there
        except BaseException:
            self._abort(file.key, upload_id)
            raise

    def _send_parts(
        self, file: File, upload_id: str, size: int, there: Mapping[int, Part], expected: str | None
    ) -> Sent:
        whole_of = digest_of(self.checksum) if self.checksum and self.checksum != "md5" else None
        whole = self.workers.submit(partial(self._hash, file, whole_of))
        under_way: deque[Future[tuple[Part, bytes | None]]] = deque()
        parts: list[Part] = []
        digests: list[bytes] = []

        def settle() -> None:
            part, digest = under_way.popleft().result()
            parts.append(part)
            if digest is not None:
                digests.append(digest)

        for number, offset in enumerate(range(0, file.size, size), start=1):
            length = min(size, file.size - offset)
            work = partial(self._part, file, upload_id, number, offset, length, there.get(number))
            under_way.append(self.workers.submit(work))
            while len(under_way) > self.connections:
                settle()
        while under_way:
            settle()
        sha256 = whole.result()
        compare(file.path, sha256, expected, "no object was written")
        file.unchanged()
        version = self._complete(file, upload_id, parts, sha256)
        said = version.checksums.get(self.checksum or "")
        if said and self.checksum and whole_of is not None and len(digests) == len(parts):
            # Of the parts' checksums, or of all bytes: which of both is the store's choice.
            wanted = composite(self.checksum, digests) if "-" in said else encoded(whole_of.digest())
            if said != wanted:
                raise self._damaged(file.key)
        if there and self.terms.tags:
            # What was begun by a former attempt has its tags already, if it was ours; if not, it has them now.
            self.api.tag(file.key, version.version_id, self.terms.tags)
        return Sent(sha256, version)

    def _hash(self, file: File, other: Digest | None) -> str:
        digest = hashlib.sha256()
        for chunk in file.pieces(0, file.size):
            self.workers.check()
            digest.update(chunk)
            if other is not None:
                other.update(chunk)
        return digest.hexdigest()

    def _part(
        self, file: File, upload_id: str, number: int, offset: int, length: int, there: Part | None
    ) -> tuple[Part, bytes | None]:
        """Send a part, unless the store has it; what is known of it, and its digest if one was asked for."""
        known = digest_of(self.checksum) if self.checksum else None
        plain = hashlib.sha256() if not self.api.settings.secure else None
        md5 = hashlib.md5(usedforsecurity=False) if there is not None else None
        wanted = [each for each in (known, plain, md5) if each is not None]
        if wanted:
            file.digest(offset, length, *wanted)
        digest = known.digest() if known and self.checksum != "md5" else None
        if there is not None and md5 is not None and self._same(there, length, md5.hexdigest(), digest):
            self.meter.skip(length)
            return there, digest
        sent: list[Part] = []

        def attempt() -> None:
            headers = {"Content-Length": str(length)}
            if known is not None and self.checksum:
                headers |= _checksum_headers(self.checksum, known)
            signed = plain.hexdigest() if plain else None
            with self._body(file, offset, length) as body:
                part, _ = self.api.upload_part(file.key, upload_id, number, body, headers, sha256=signed)
            sent[:] = [part]

        self._with_checksum(lambda: self.workers.persist(attempt, lambda: 0))
        part = sent[0]
        if digest is not None and self.checksum:
            if part.checksums.get(self.checksum, encoded(digest)) != encoded(digest):
                raise self._damaged(file.key)
            if self.checksum not in part.checksums:
                digest = None  # the store took no checksum: it has none of the whole to compare either
        return part, digest

    def _same(self, there: Part, length: int, md5: str, digest: bytes | None) -> bool:
        """Whether the part that the store has is that of the file."""
        if there.size != length:
            return False
        if digest is not None and self.checksum and self.checksum in there.checksums:
            return there.checksums[self.checksum] == encoded(digest)
        return there.etag.strip('"').lower() == md5

    # -- beginning, ending -------------------------------------------------------------------------------------------

    def _begun(self, key: str) -> tuple[str | None, dict[int, Part]]:
        """The upload that a killed attempt has left, and its parts. Nothing where the store does not tell."""
        try:
            upload_id = self.api.unfinished_upload(key, self.terms.headers.get("x-amz-storage-class"))
            if upload_id is None:
                return None, {}
            there = {part.number: part for part in self.api.parts(key, upload_id)}
        except StepFailure:
            return None, {}  # not allowed to look, or not known there: then from the beginning
        # How the object is to be encrypted was said when the upload began, and shows only when a part is sent: so at
        # least one is.
        if self.terms.headers.get("x-amz-server-side-encryption") or self.api.settings.customer_key:
            there.pop(max(there, default=0), None)
        return (upload_id, there) if there else (None, {})

    def _begin(self, key: str) -> str:
        begun: list[str] = []

        def attempt() -> None:
            headers = {"Content-Type": "application/octet-stream", **self.terms.headers, **self._tagging()}
            if self.checksum and self.checksum != "md5":
                headers["x-amz-checksum-algorithm"] = self.checksum.upper()
            begun[:] = [self.api.create_upload(key, headers)]

        self._with_checksum(lambda: self.workers.persist(attempt, lambda: 0))
        return begun[0]

    def _complete(self, file: File, upload_id: str, parts: list[Part], sha256: str) -> Version:
        done: list[Version] = []

        def attempt() -> None:
            version, _ = self.api.complete_upload(file.key, upload_id, parts, self.terms.condition)
            done[:] = [version]

        self._carefully(attempt, file.key, lambda: self._is_ours(file, sha256), done)
        return done[0]

    def _abort(self, key: str, upload_id: str) -> None:
        """Give the parts up. No more than a try, and not for long: the cause of the failure is what has to be told,
        and a cancelled step is killed soon."""
        self.workers.stop.set()
        self.workers.aside(partial(self.api.abort_upload, key, upload_id), _ABORT_S)

    # -- care --------------------------------------------------------------------------------------------------------

    def _carefully(
        self, attempt: Callable[[], None], key: str, ours: Callable[[], Version | None], done: list[Version]
    ) -> None:
        """Write under the caller's condition. Where that no longer holds, it may be this very step that saw to it:
        the answer to an earlier try was lost, or its process was killed. Then the object is ours, and it is done."""
        try:
            self._with_checksum(lambda: self.workers.persist(attempt, lambda: 0))
        except Refused as refused:
            conflict = refused.status in {409, 412} and bool(self.terms.condition)
            gone = refused.error_code == "NoSuchUpload"
            absent = refused.status == 404 and self.terms.if_etag is not None and not gone
            if not conflict and not gone and not absent:
                raise
            found = ours()
            if found is not None:
                done[:] = [found]
                return
            if gone:
                raise
            what, shown = self.api.settings.object(key), self.api.settings.shown
            if self.terms.if_etag is not None:
                message = f"{what} at {shown} is no longer the one with the tag {self.terms.if_etag}: it was left alone"
            else:
                message = f"there is already {what} at {shown}, and 'overwrite' is false: it was left alone"
            raise StepFailure(message, code="exists" if self.terms.if_etag is None else "not_the_same") from refused

    def _is_ours(self, file: File, sha256: str) -> Version | None:
        """The object as it is now, if it surely is what this step writes: by a checksum, or by its tag."""
        try:
            found = self.api.head(file.key)
        except StepFailure:
            return None
        if found.size != file.size:
            return None
        if known := found.checksums.get("sha256"):
            return found if known == encoded(bytes.fromhex(sha256)) else None
        return found if found.etag.strip('"').lower() == file.tag(self.part_bytes(file.size)) else None

    def _with_checksum(self, attempt: Callable[[], None]) -> None:
        """Try; and where a store refuses the checksum that it was not obliged to know, once more without."""
        try:
            attempt()
        except Refused as refused:
            optional = self.checksum is not None and self.terms.checksum_optional
            if not optional or refused.error_code not in _REFUSES_CHECKSUMS or refused.status not in {400, 501}:
                raise
            self.checksum = None
            attempt()

    @contextmanager
    def _body(self, file: File, offset: int, length: int) -> Iterator[Iterable[bytes]]:
        """A range of the file as the body of a request. If that fails, what was sent of it does not count as moved."""
        moved = 0

        def chunks() -> Iterator[bytes]:
            nonlocal moved
            for chunk in file.pieces(offset, length):
                self.workers.check()
                yield chunk
                moved += len(chunk)
                self.meter.add(len(chunk))

        try:
            yield chunks()
        except BaseException:
            self.meter.skip(-moved)
            raise

    def _tagging(self) -> dict[str, str]:
        return {"x-amz-tagging": urlencode(self.terms.tags)} if self.terms.tags else {}

    def _damaged(self, key: str) -> StepFailure:
        return StepFailure(
            f"{self.api.settings.object(key)} did not reach {self.api.settings.shown} intact: its "
            f"{(self.checksum or '').upper()} there is another",
            code="damaged",
            temporary=True,
        )


def _checksum_headers(algorithm: str, digest: Any) -> dict[str, str]:
    value = base64.b64encode(digest.digest()).decode()
    return {"Content-MD5": value} if algorithm == "md5" else {f"x-amz-checksum-{algorithm}": value}
