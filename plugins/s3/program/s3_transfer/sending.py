"""Files into objects: in parts over several connections, none of which is sent a second time after a kill."""

from __future__ import annotations

import hashlib
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

from s3_transfer.api import PART_BYTES_HEADER, Api, Part, Version
from s3_transfer.checks import Digest, compare, composite, digest_of, encoded, md5_of
from s3_transfer.errors import Refused
from s3_transfer.files import File
from s3_transfer.pace import Pace
from s3_transfer.terms import PART_BYTES, Terms, part_bytes
from s3_transfer.transport import CHUNK_BYTES
from s3_transfer.workers import Workers

_MAX_OBJECT_BYTES = 5 * 1024**4
_ABORT_S = 5.0
_MAX_LOOKED_AT = 10
NOTHING_SENT = "nothing was sent"
_REFUSES_CHECKSUMS = frozenset({"NotImplemented", "InvalidArgument", "InvalidRequest", "UnsupportedHeader"})


@dataclass(frozen=True, slots=True)
class Sent:
    """An object as it was written."""

    sha256: str
    version: Version


@dataclass(slots=True)
class _Stretch:
    """A range of a file that is sent with one request, and its digests."""

    file: File
    offset: int
    length: int
    known: Digest | None
    """Of the algorithm that the store is asked to check, if any."""
    _md5: Any = None

    @property
    def md5(self) -> Any:
        """Taken when it is first asked for, because most stores take a checksum that costs less."""
        if self._md5 is None:
            self._md5 = hashlib.md5(usedforsecurity=False)
            self.file.digest(self.offset, self.length, self._md5)
        return self._md5


@dataclass(slots=True)
class Sender:
    """Writes objects. ``meter`` counts what has arrived."""

    api: Api
    terms: Terms
    workers: Workers
    meter: Meter
    pace: Pace
    checksum: str | None = field(init=False)
    unconfirmed: bool = field(init=False, default=False)
    """Whether the store has taken a checksum without a word, which it may not have looked at."""

    def __post_init__(self) -> None:
        self.checksum = self.terms.checksum

    def part_bytes(self, key: str, size: int) -> int | None:
        """How large the parts are in which this step sends ``size`` bytes to ``key``; None if they go as a whole."""
        return part_bytes(size, self.terms.mark(key))

    # -- a file of one request ---------------------------------------------------------------------------------------

    def put(self, path: str, key: str, size: int, expected: str | None = None, listed: Version | None = None) -> Sent:
        """Send a file of one part. ``expected`` is its SHA-256, if that is known; ``listed`` what was there before."""
        condition = self.terms.condition(listed)
        file = File.open(path, key, size)
        sha256, other = hashlib.sha256(), self._digest()
        file.digest(0, size, sha256, *([other] if other else []))
        whole = _Stretch(file, 0, size, other)
        compare(path, sha256.hexdigest(), expected, NOTHING_SENT)
        written: list[Version] = []

        def attempt() -> None:
            headers = {
                "Content-Length": str(size),
                "Content-Type": "application/octet-stream",
                **self.terms.headers,
                **self._tagging(),
                **condition,
            }
            headers |= self._checksum_headers(whole)
            digest = None if self.api.settings.secure else sha256.hexdigest()
            with self._body(file, 0, size) as body:
                version = self.api.put(key, body, headers, sha256=digest)
            written[:] = [version]

        found = self._carefully(attempt, key, condition, lambda: self._is_ours(file, sha256.hexdigest()))
        if found is None and not self._intact(whole, written[0]):
            self.workers.aside(partial(self.api.delete, key, written[0]), _ABORT_S)
            raise self._damaged(key)
        version = self._encrypted(key, found or written[0], ours=found is None)
        file.unchanged()
        return Sent(sha256.hexdigest(), version)

    # -- a file of many ----------------------------------------------------------------------------------------------

    def send(self, file: File, expected: str | None = None, listed: Version | None = None) -> Sent:
        """Send a file of several parts; what an attempt before this one has sent of it is not sent again."""
        condition = self.terms.condition(listed)
        if file.size > _MAX_OBJECT_BYTES:
            raise StepFailure(f"{file.path} is larger than the 5 TiB that an object can have", code="too_large")
        size = self.part_bytes(file.key, file.size) or PART_BYTES
        upload_id, there = self._begun(file, size)
        if upload_id is None:
            upload_id = self._begin(file.key, size)
        try:
            return self._send_parts(file, upload_id, size, there, expected, condition)
        except StepFailure as failure:
            if not failure.temporary or failure.code in {"changed", "damaged"}:
                self._abort(file.key, upload_id)
            raise  # after a temporary one, the next attempt goes on with what is there
        except BaseException:
            self._abort(file.key, upload_id)
            raise

    def _send_parts(
        self,
        file: File,
        upload_id: str,
        size: int,
        there: Mapping[int, Part],
        expected: str | None,
        condition: Mapping[str, str],
    ) -> Sent:
        whole_of = self._digest()
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
            while len(under_way) > self.pace.connections:
                settle()
        while under_way:
            settle()
        sha256 = whole.result()
        compare(file.path, sha256, expected, "no object was written")
        file.unchanged()
        version = self._complete(file, upload_id, parts, sha256, condition)
        said = version.checksums.get(self.checksum or "")
        if said and self.checksum and whole_of is not None and len(digests) == len(parts):
            # Of the parts' checksums, or of all bytes: which of both is the store's choice.
            wanted = composite(self.checksum, digests) if "-" in said else encoded(whole_of.digest())
            if said != wanted:
                self.workers.aside(partial(self.api.delete, file.key, version), _ABORT_S)
                raise self._damaged(file.key)
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
        known = self._digest()
        plain = hashlib.sha256() if not self.api.settings.secure else None
        wanted = [each for each in (known, plain) if each is not None]
        if wanted:
            file.digest(offset, length, *wanted)
        stretch = _Stretch(file, offset, length, known)
        digest = known.digest() if known else None
        if there is not None and self._same(there, stretch, digest):
            self.meter.skip(length)
            return there, digest
        sent: list[tuple[Part, Version]] = []

        def attempt() -> None:
            headers = {"Content-Length": str(length), **self._checksum_headers(stretch)}
            signed = plain.hexdigest() if plain else None
            with self._body(file, offset, length) as body:
                part, said = self.api.upload_part(file.key, upload_id, number, body, headers, sha256=signed)
            if said.encryption is not None and not self.terms.encrypted(said):
                raise self._other_encryption(file.key, said)
            sent[:] = [(part, said)]

        self._with_checksum(lambda: self.workers.persist(attempt, lambda: 0))
        part, said = sent[0]
        if not self._intact(stretch, said):
            raise self._damaged(file.key)
        if self.checksum not in part.checksums:
            digest = None  # the store took no checksum: it has none of the whole to compare either
        return part, digest

    def _same(self, there: Part, stretch: _Stretch, digest: bytes | None) -> bool:
        """Whether the part that the store has is that of the file."""
        if digest is not None and self.checksum and self.checksum in there.checksums:
            return there.checksums[self.checksum] == encoded(digest)
        return bool(there.etag.strip('"').lower() == stretch.md5.hexdigest())

    # -- beginning, ending -------------------------------------------------------------------------------------------

    def _begun(self, file: File, size: int) -> tuple[str | None, dict[int, Part]]:
        """The upload that a former attempt of this step has left, and its parts. Nothing where the store does not
        tell, and nothing of others': their parts are of another size."""
        try:
            for upload_id in self.api.unfinished_uploads(file.key)[:_MAX_LOOKED_AT]:
                there = {part.number: part for part in self.api.parts(file.key, upload_id)}
                if there and all(
                    part.size == min(size, file.size - (number - 1) * size) for number, part in there.items()
                ):
                    return upload_id, there
        except StepFailure:
            pass  # not allowed to look, or not known there: then from the beginning
        return None, {}

    def _begin(self, key: str, size: int) -> str:
        begun: list[str] = []

        def attempt() -> None:
            headers = {"Content-Type": "application/octet-stream", PART_BYTES_HEADER: str(size)}
            headers |= {**self.terms.headers, **self._tagging()}
            if self.checksum and self.checksum != "md5":
                headers["x-amz-checksum-algorithm"] = self.checksum.upper()
            begun[:] = [self.api.create_upload(key, headers)]

        self._with_checksum(lambda: self.workers.persist(attempt, lambda: 0))
        return begun[0]

    def _complete(
        self, file: File, upload_id: str, parts: list[Part], sha256: str, condition: Mapping[str, str]
    ) -> Version:
        done: list[Version] = []

        def attempt() -> None:
            done[:] = [self.api.complete_upload(file.key, upload_id, parts, condition)]

        found = self._carefully(attempt, file.key, condition, lambda: self._is_ours(file, sha256))
        return self._encrypted(file.key, found or done[0], ours=found is None)

    def _abort(self, key: str, upload_id: str) -> None:
        """Give the parts up. No more than a try, and not for long: the cause of the failure is what has to be told,
        and a cancelled step is killed soon."""
        self.workers.stop.set()
        self.workers.aside(partial(self.api.abort_upload, key, upload_id), _ABORT_S)

    # -- care --------------------------------------------------------------------------------------------------------

    def _carefully(
        self,
        attempt: Callable[[], None],
        key: str,
        condition: Mapping[str, str],
        ours: Callable[[], Version | None],
    ) -> Version | None:
        """Write under the caller's condition. Where that no longer holds, it may be this very step that saw to it:
        the answer to an earlier try was lost, or its process was killed. Then the object is ours, and it is done:
        it is what is returned."""
        try:
            self._with_checksum(lambda: self.workers.persist(attempt, lambda: 0))
            return None
        except Refused as refused:
            conflict = refused.status in {409, 412} and bool(condition)
            gone = refused.error_code == "NoSuchUpload"
            absent = refused.status == 404 and "If-Match" in condition and not gone
            if refused.status == 501 and condition:
                raise StepFailure(
                    f"{self.api.settings.shown} can't write under a condition: leave 'overwrite: false', 'if_etag' and "
                    "'if_unchanged' out, and see to it that nobody else writes there",
                    code="no_conditions",
                ) from refused
            if not conflict and not gone and not absent:
                raise
            found = ours()
            if found is not None:
                return found
            if gone:
                raise
            raise self._left_alone(key) from refused

    def _left_alone(self, key: str) -> StepFailure:
        terms, what = self.terms, f"{self.api.settings.object(key)} at {self.api.settings.shown}"
        if terms.if_etag is not None:
            message = f"{what} is no longer the one with the tag {terms.if_etag}: it was left alone"
        elif not terms.overwrite:
            return StepFailure(f"there is already {what}, and 'overwrite' is false: it was left alone", code="exists")
        else:
            message = f"{what} was changed by somebody else since its prefix was listed: it was left alone"
        return StepFailure(message, code="not_the_same")

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
        return found if found.etag.strip('"').lower() == file.tag(self.part_bytes(file.key, file.size)) else None

    def _digest(self) -> Digest | None:
        """A digest of the algorithm that the store is asked to check; an MD5 is taken in another place."""
        return digest_of(self.checksum) if self.checksum and self.checksum != "md5" else None

    def _checksum_headers(self, stretch: _Stretch) -> dict[str, str]:
        """What the store is asked to check: a checksum, or the MD5 where it knows none or has not confirmed one."""
        headers: dict[str, str] = {}
        if self.checksum and stretch.known:
            headers[f"x-amz-checksum-{self.checksum}"] = encoded(stretch.known.digest())
        if self.terms.checksum and (self.checksum in (None, "md5") or self.unconfirmed):
            headers["Content-MD5"] = encoded(stretch.md5.digest())
        return headers

    def _intact(self, stretch: _Stretch, version: Version) -> bool:
        """Whether what the store has is what was sent: by the checksum in its answer, or by a tag that is an MD5."""
        if self.terms.checksum is None:
            return True
        said = version.checksums.get(self.checksum or "")
        if said and stretch.known:
            return said == encoded(stretch.known.digest())
        self.unconfirmed = True
        tag = md5_of(version) if self.terms.encryption in (None, "AES256") else None
        return tag is None or tag == stretch.md5.hexdigest()

    def _encrypted(self, key: str, version: Version, *, ours: bool) -> Version:
        """Raise StepFailure if the object is not encrypted as the caller has asked. ``ours`` says that it was written
        by this attempt: then it is removed."""
        if self.terms.encryption is None:
            return version
        found = [version]
        if version.encryption is None:  # not every store says it in this answer

            def look() -> None:
                found[:] = [self.api.head(key, version.version_id)]

            try:
                self.workers.persist(look, lambda: 0)
            except Refused as refused:
                if refused.temporary:
                    raise
        if not self.terms.encrypted(found[0]):
            if ours:
                self.workers.aside(partial(self.api.delete, key, version), _ABORT_S)
            raise self._other_encryption(key, found[0])
        return version

    def _other_encryption(self, key: str, found: Version) -> StepFailure:
        settings = self.api.settings
        return StepFailure(
            f"{settings.shown} encrypts {settings.object(key)} with {found.encryption or 'nothing'}"
            f"{f' and key {found.kms_key_id}' if found.kms_key_id else ''}, not with {self.terms.encryption} as asked: "
            "take an encryption that this store has",
            code="encryption",
        )

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
            for chunk in file.pieces(offset, length, self.pace.piece_bytes(CHUNK_BYTES)):
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
            f"{self.api.settings.object(key)} did not reach {self.api.settings.shown} intact: its checksum there is "
            "another (for a store whose tags look like MD5 and are something else, set 'checksum' to none)",
            code="damaged",
            temporary=True,
        )
