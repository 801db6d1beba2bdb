"""s3.download: fetch in parts over several connections, check, and only then publish."""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from outrider_stepkit import StepFailure, free_bytes, staged_directory, staged_file
from outrider_stepkit.publish import sync_directory, sync_filesystem

from s3_transfer.objects import CHUNK_BYTES, PART_BYTES, Entry, list_objects, listing_sha256
from s3_transfer.store import CONNECTIONS, Meter, Store
from s3_transfer.workers import Workers

Report = Callable[[int, int], None]


def download(params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Fetch what ``params`` names; the outputs of the step. ``report(done, total)`` gets bytes.

    Raises StepFailure or OSError; then nothing has changed at the target.
    """
    store = Store(params, env)
    if params.get("key") is not None:
        return _download_object(store, params["key"], params["to"], params.get("sha256"), report)
    return _download_prefix(store, params["prefix"], params["to"], params.get("sha256"), report)


def _download_object(store: Store, key: str, to: str, expected: str | None, report: Report) -> dict[str, Any]:
    target = os.path.join(to, key.rsplit("/", 1)[-1]) if to.endswith("/") else to
    if os.path.isdir(target):
        raise StepFailure(
            f"{target} is a directory: name the file, or end 'to' with a slash to keep the object's name",
            code="is_a_directory",
        )
    entry, first = _open(store, key)
    with staged_file(target) as file, Workers(CONNECTIONS) as workers:
        # A duplicate, because a thread may outlive the stage: see _Job.
        job = _Job(entry, target, os.dup(file.fileno()))
        ((_, digest),) = _fetch(store, [job], workers, report, first)
        _compare(store.object(key), store, digest, expected)
    outputs = {"path": target, "bytes": entry.size, "sha256": digest, "objects": 1}
    return outputs | ({"etag": entry.etag.strip('"')} if entry.etag else {})


def _download_prefix(store: Store, prefix: str, to: str, expected: str | None, report: Report) -> dict[str, Any]:
    target = Path(to)
    if target.exists() and not target.is_dir():
        raise StepFailure(f"{target} is a file: a prefix needs a directory", code="not_a_directory")
    entries = list_objects(store, prefix)
    with staged_directory(target) as stage, Workers(CONNECTIONS) as workers:
        jobs = [_Job(entry, str(stage / str(number))) for number, entry in enumerate(entries)]
        digests = _fetch(store, jobs, workers, report)
        digest = listing_sha256((entry.name, digest) for entry, digest in digests)
        _compare(f"prefix {prefix!r} of bucket {store.bucket!r}", store, digest, expected)
        sync_filesystem(stage)
        _publish(jobs, target)
    return {"path": str(target), "bytes": sum(e.size for e in entries), "sha256": digest, "objects": len(entries)}


def _publish(jobs: list[_Job], target: Path) -> None:
    """Move every file to its place. What can be foreseen to fail is looked for before the first one moves."""
    for job in jobs:
        path = target / job.entry.name
        if path.is_dir() and not path.is_symlink():
            raise StepFailure(f"{path} is a directory, and an object has to be written there", code="is_a_directory")
        blocked = next((up for up in path.parents if up.exists() and not up.is_dir()), None)
        if blocked:
            raise StepFailure(f"{blocked} is a file, and objects have to be written below it", code="not_a_directory")
    directories = {(target / job.entry.name).parent for job in jobs}
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        os.replace(job.path, target / job.entry.name)
    for directory in directories:
        sync_directory(directory)


def _open(store: Store, key: str) -> tuple[Entry, Any]:
    """The object's size and tag, and the body of its first part: one request where HEAD and GET would be two."""
    with store.errors(store.object(key)):
        try:
            answer = store.client.get_object(Bucket=store.bucket, Key=key, Range=f"bytes=0-{PART_BYTES - 1}")
        except store.client.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") not in {"InvalidRange", "416"}:
                raise
            answer = store.client.get_object(Bucket=store.bucket, Key=key)  # an empty object has no first byte
    content_range = answer.get("ContentRange")
    size = int(content_range.rsplit("/", 1)[-1]) if content_range else int(answer["ContentLength"])
    return Entry(key, key.rsplit("/", 1)[-1], size, answer.get("ETag")), answer["Body"]


@dataclass(slots=True)
class _Job:
    """An object and the file that it is fetched to, opened at ``path`` when its turn comes if it is not open yet.

    The descriptor is closed when the file is whole. When the transfer fails it is left to the end of the process: a
    thread may be inside a write to it, and its number could by then be another file's.
    """

    entry: Entry
    path: str
    descriptor: int = -1
    digest: Any = field(default_factory=hashlib.sha256)

    def open(self) -> None:
        if self.descriptor < 0:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


@dataclass(slots=True)
class _Part:
    """A range of an object, and how much of it has been written to the file."""

    job: _Job
    offset: int
    length: int
    done: int = 0
    body: Any = None  # an answer that is already there


def _fetch(
    store: Store, jobs: list[_Job], workers: Workers, report: Report, first: Any = None
) -> list[tuple[Entry, str]]:
    """Fetch every object to its file; the SHA-256 of each. ``first`` is the body of the first part, if it is there.

    The parts arrive in any order and are hashed here in theirs, as soon as each is whole, while it is still
    in the page cache.
    """
    total = sum(job.entry.size for job in jobs)
    _check_room(Path(jobs[0].path).parent, total)
    meter = Meter(total, report)
    digests: list[tuple[Entry, str]] = []
    under_way: deque[tuple[_Part, Future[None]]] = deque()

    def settle() -> None:
        part, future = under_way.popleft()
        future.result()
        _hash(part)
        job = part.job
        if part.offset + part.length == job.entry.size:
            os.close(job.descriptor)
            digests.append((job.entry, job.digest.hexdigest()))

    for job in jobs:
        job.open()
        for offset in range(0, job.entry.size, PART_BYTES) or (0,):
            part = _Part(job, offset, min(PART_BYTES, job.entry.size - offset), body=first)
            first = None
            under_way.append((part, workers.submit(partial(_fetch_part, store, part, workers, meter))))
            while len(under_way) > 2 * CONNECTIONS:
                settle()
    while under_way:
        settle()
    return digests


def _fetch_part(store: Store, part: _Part, workers: Workers, meter: Meter) -> None:
    if part.length:
        workers.persist(lambda: _continue_part(store, part, workers, meter), lambda: part.done)
    elif part.body is not None:
        part.body.close()


def _continue_part(store: Store, part: _Part, workers: Workers, meter: Meter) -> None:
    """Fetch what is still missing of a part. Raises StepFailure when the connection is cut."""
    with store.errors(store.object(part.job.entry.key)):
        body, part.body = part.body or _request(store, part), None
        with closing(body):
            while part.done < part.length:
                chunk = body.read(min(CHUNK_BYTES, part.length - part.done))
                if not chunk:
                    raise ConnectionError
                workers.check()
                _write(part, chunk)
                part.done += len(chunk)
                meter.add(len(chunk))


def _request(store: Store, part: _Part) -> Any:
    start, end = part.offset + part.done, part.offset + part.length - 1
    # Without the condition, an object replaced between two requests would end up half old, half new.
    condition = {"IfMatch": part.job.entry.etag} if part.job.entry.etag else {}
    answer = store.client.get_object(
        Bucket=store.bucket, Key=part.job.entry.key, Range=f"bytes={start}-{end}", **condition
    )
    whole = start == 0 and answer.get("ContentRange") is None and answer["ContentLength"] == part.job.entry.size
    if not whole and not re.fullmatch(
        rf"bytes {start}-{end}/({part.job.entry.size}|\*)", answer.get("ContentRange") or ""
    ):
        answer["Body"].close()
        raise StepFailure(
            f"{store.endpoint} answered with another range of {store.object(part.job.entry.key)} than was asked for",
            code="changed",
            temporary=True,
        )
    return answer["Body"]


def _write(part: _Part, chunk: bytes) -> None:
    view, position = memoryview(chunk), part.offset + part.done
    while view:
        try:
            written = os.pwrite(part.job.descriptor, view, position)
        except OSError as error:
            raise OSError(error.errno, error.strerror, part.job.path) from error
        view, position = view[written:], position + written


def _hash(part: _Part) -> None:
    position, end = part.offset, part.offset + part.length
    while position < end:
        chunk = os.pread(part.job.descriptor, min(CHUNK_BYTES, end - position), position)
        if not chunk:
            raise StepFailure(f"the copy of {part.job.entry.key!r} was cut short by someone else", code="io")
        part.job.digest.update(chunk)
        position += len(chunk)


def _compare(what: str, store: Store, digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected.lower():
        raise StepFailure(
            f"{what} at {store.endpoint} has SHA-256 {digest}, not {expected.lower()}; nothing was published",
            code="checksum_mismatch",
        )


def _check_room(directory: Path, size: int) -> None:
    free = free_bytes(directory)
    if size > free:
        raise StepFailure(
            f"{size} bytes are to be downloaded and the volume has room for {free}: give it a larger size",
            code="volume_full",
        )
