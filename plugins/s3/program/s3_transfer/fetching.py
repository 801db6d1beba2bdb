"""Objects into files: in ranges over several connections, gone on with where they were cut, checked as they arrive."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from outrider_stepkit import StepFailure
from outrider_stepkit.meter import Meter

from s3_transfer.api import Api, Version
from s3_transfer.checks import Verifier
from s3_transfer.disk import begin_writing
from s3_transfer.pace import Pace
from s3_transfer.partial import Partials
from s3_transfer.workers import Workers

PART_BYTES = 16 * 1024**2
_READ_BYTES = _HASHED_BYTES = 256 * 1024
"""Small enough to stay in the processor's cache between two looks at the same bytes."""
_NOTE_BYTES = 8 * 1024**2
"""How much of a range is fetched again at most after a kill."""


@dataclass(frozen=True, slots=True)
class Job:
    """One object to fetch. ``version`` is what is known of it; its checksums may come with its bytes."""

    key: str
    name: str
    version: Version
    identity: str
    expected: str | None = None
    """The SHA-256 that its content has to have."""
    looked_at: bool = False
    """Whether ``version`` has all that the store knows; otherwise it is from a listing."""


@dataclass(slots=True)
class _Range:
    """A part of an object, and how much of it is in the file."""

    offset: int
    length: int
    done: int = 0
    noted: int = 0


@dataclass(slots=True)
class _File:
    """A large object under way.

    The descriptor is closed when the file is whole. When the transfer fails it is left to the end of the process: a
    thread may be inside a write to it, and its number could by then be another file's.
    """

    job: Job
    path: str
    descriptor: int
    verifier: Verifier


@dataclass(slots=True)
class _Small:
    """An object of one request under way: what is in the file has been hashed."""

    descriptor: int
    done: int = 0
    verifier: Verifier | None = None


class Fetcher:
    """Fetches jobs into ``partials``."""

    def __init__(
        self, api: Api, partials: Partials, workers: Workers, meter: Meter, *, pace: Pace, service: bool
    ) -> None:
        """``service``: the store's checksums are compared, too."""
        self._api, self._partials, self._workers, self._meter = api, partials, workers, meter
        # Requests are prepared ahead, so that no connection waits for the next.
        self._window, self._service = 4 * pace.connections, service
        self._read_bytes = pace.piece_bytes(_READ_BYTES)
        self._buffer = memoryview(bytearray(_HASHED_BYTES))

    def fetch(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, str]]:
        """Fetch every object to its file; each with its SHA-256, when it is whole. Raises StepFailure or OSError."""
        # In the order of the objects and of their ranges. Large objects are hashed here, range by range as each is
        # whole and still in the page cache, while the threads fetch on.
        under_way: deque[tuple[Job, _File | None, _Range, Future[Any]]] = deque()

        def settle() -> tuple[Job, str] | None:
            job, file, piece, future = under_way.popleft()
            digest = self._workers.result(future)
            if file is None:
                return job, str(digest)
            self._hash(file, piece)
            if piece.offset + piece.length < job.version.size:
                return None
            os.close(file.descriptor)
            digest = self._checked(job, file.verifier)
            self._partials.finish(job.identity, digest)
            return job, digest

        for job in jobs:
            if digest := self._partials.whole.get(job.identity):
                self._meter.skip(job.version.size)
                yield job, digest
                continue
            if job.version.size <= PART_BYTES:
                small = self._workers.submit(partial(self._fetch_small, job))
                under_way.append((job, None, _Range(0, job.version.size), small))
            else:
                file = self._open(job)
                for piece in self._ranges(job):
                    large = self._workers.submit(partial(self._fetch_range, file, piece))
                    under_way.append((job, file, piece, large))
                    while len(under_way) > self._window:
                        if whole := settle():
                            yield whole
            while len(under_way) > self._window:
                if whole := settle():
                    yield whole
        while under_way:
            if whole := settle():
                yield whole

    # -- objects of one request --------------------------------------------------------------------------------------

    def _fetch_small(self, job: Job) -> str:
        """Fetch an object with one request, and further ones only where that is cut; its SHA-256."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._partials.path(job.identity), flags, 0o644)
        try:
            small = _Small(descriptor)
            self._workers.persist(lambda: self._continue_small(job, small), lambda: small.done)
            begin_writing(descriptor, 0, small.done)
        finally:
            os.close(descriptor)
        assert small.verifier is not None
        digest = self._checked(job, small.verifier)
        self._partials.finish(job.identity, digest)
        return digest

    def _continue_small(self, job: Job, small: _Small) -> None:
        size, start = job.version.size, small.done
        with self._api.transport.errors(self._api.settings.object(job.key)):
            answer = self._api.get(job.key, job.version.version_id, start=start, etag=_condition(job.version))
            with closing(answer):
                if start:
                    self._same_range(job, answer, start, size - 1)
                elif small.verifier is None:
                    found = Version.of(answer.headers)
                    if found.size not in (size, -1):
                        raise self._changed(job)
                    known = found if found.checksums or not job.version.checksums else job.version
                    small.verifier = self._verifier(job, known)
                while small.done < size:
                    chunk = answer.read(min(self._read_bytes, size - small.done))
                    if not chunk:
                        raise ConnectionError
                    self._workers.check()
                    _write(small.descriptor, chunk, small.done, job.name)
                    assert small.verifier is not None
                    small.verifier.update(chunk)
                    small.done += len(chunk)
                    self._meter.add(len(chunk))
                answer.release_conn()

    # -- objects of several ranges -----------------------------------------------------------------------------------

    def _open(self, job: Job) -> _File:
        path = self._partials.path(job.identity)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        version = job.version
        if self._service and job.expected is None and not job.looked_at:
            # A listing has no checksums.
            version = self._api.head(job.key, version.version_id)
            if (version.size, version.etag) != (job.version.size, job.version.etag):
                raise self._changed(job)
        return _File(job, path, os.open(path, flags, 0o644), self._verifier(job, version))

    def _ranges(self, job: Job) -> Iterator[_Range]:
        known = self._partials.ranges.get(job.identity, {})
        for offset in range(0, job.version.size, PART_BYTES):
            length = min(PART_BYTES, job.version.size - offset)
            done = min(known.get(offset, 0), length)
            self._meter.skip(done)
            yield _Range(offset, length, done, done)

    def _fetch_range(self, file: _File, piece: _Range) -> None:
        if piece.done < piece.length:
            self._workers.persist(lambda: self._continue(file, piece), lambda: piece.done)

    def _continue(self, file: _File, piece: _Range) -> None:
        """Fetch what is still missing of a range. Raises StepFailure when the connection is cut."""
        job, (start, end) = file.job, (piece.offset + piece.done, piece.offset + piece.length - 1)
        with self._api.transport.errors(self._api.settings.object(job.key)):
            # Without the condition, an object replaced between two requests would end up half old, half new.
            etag = _condition(job.version)
            with closing(self._api.get(job.key, job.version.version_id, start=start, end=end, etag=etag)) as answer:
                self._same_range(job, answer, start, end)
                while piece.done < piece.length:
                    chunk = answer.read(min(self._read_bytes, piece.length - piece.done))
                    if not chunk:
                        raise ConnectionError
                    self._workers.check()
                    _write(file.descriptor, chunk, piece.offset + piece.done, job.name)
                    piece.done += len(chunk)
                    self._meter.add(len(chunk))
                    if piece.done - piece.noted >= _NOTE_BYTES or piece.done == piece.length:
                        self._partials.note(job.identity, piece.offset, piece.done)
                        begin_writing(file.descriptor, piece.offset + piece.noted, piece.done - piece.noted)
                        piece.noted = piece.done
                answer.release_conn()

    def _hash(self, file: _File, piece: _Range) -> None:
        position, end = piece.offset, piece.offset + piece.length
        while position < end:
            count = os.preadv(file.descriptor, [self._buffer[: end - position]], position)
            if not count:
                self._partials.forget(file.job.identity)
                raise StepFailure(f"the copy of {file.job.key!r} was cut short by someone else", code="io")
            file.verifier.update(self._buffer[:count])
            position += count

    # -- both --------------------------------------------------------------------------------------------------------

    def _verifier(self, job: Job, version: Version) -> Verifier:
        def part_size() -> int | None:
            return self._api.head(job.key, job.version.version_id, part=1).size or None

        return Verifier(version, expected=job.expected, service=self._service, part_size=part_size)

    def _checked(self, job: Job, verifier: Verifier) -> str:
        try:
            return verifier.finish(f"{self._api.settings.object(job.key)} at {self._api.settings.shown}")
        except StepFailure:
            self._partials.forget(job.identity)
            raise

    def _same_range(self, job: Job, answer: Any, start: int, end: int) -> None:
        """Raise StepFailure unless the answer has the bytes that were asked for."""
        said, size = answer.headers.get("content-range"), job.version.size
        length = answer.headers.get("content-length")
        if said is None and start == 0 and end == size - 1 and length == str(size):
            return  # the whole object, which is what was asked for
        if not re.fullmatch(rf"bytes {start}-{end}/({size}|\*)", said or ""):
            raise self._changed(job)

    def _changed(self, job: Job) -> StepFailure:
        return StepFailure(
            f"{self._api.settings.shown} answered with other bytes of {self._api.settings.object(job.key)} than were "
            "asked for: it was replaced meanwhile",
            code="changed",
            temporary=True,
        )


def _condition(version: Version) -> str:
    # A weak tag says that two contents are as good as each other, not that they are the same; it can't be asked for.
    return "" if version.etag.startswith("W/") else version.etag


def _write(descriptor: int, data: bytes | bytearray, position: int, name: str) -> None:
    view = memoryview(data)
    while view:
        try:
            written = os.pwrite(descriptor, view, position)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from error
        view, position = view[written:], position + written
