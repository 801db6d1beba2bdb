"""s3.upload: send files in parts, so that an object appears whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from outrider_stepkit import StepFailure

from s3_transfer.objects import CHUNK_BYTES, PART_BYTES, Entry, list_files, listing_sha256
from s3_transfer.store import CONNECTIONS, Meter, Store
from s3_transfer.workers import Workers

_MAX_PARTS = 10_000
_ABORT_S = 5.0
_MAX_OBJECT_BYTES = 5 * 1024**4
_CONTENT_TYPE = "application/octet-stream"

Report = Callable[[int, int], None]


def upload(params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Send what ``params`` names; the outputs of the step. ``report(done, total)`` gets bytes.

    Raises StepFailure or OSError; the object that could not be sent is then as it was.
    """
    store = Store(params, env)
    source, expected = params["from"], params.get("sha256")
    if params.get("key") is not None:
        return _upload_object(store, params["key"], source, expected, report)
    return _upload_prefix(store, params["prefix"], source, expected, report)


def _upload_object(store: Store, key: str, source: str, expected: str | None, report: Report) -> dict[str, Any]:
    if os.path.isdir(source):
        raise StepFailure(
            f"{source} is a directory: send it with 'prefix' instead of 'key', or pack it with archive.create",
            code="is_a_directory",
        )
    file = _File.open(source, key)
    if expected is not None:
        _compare(source, _hash(file), expected)
    with Workers(CONNECTIONS) as workers:
        digest, etag = _send(store, file, workers, Meter(file.size, report), expected)
    outputs = {"path": source, "bytes": file.size, "sha256": digest, "objects": 1}
    return outputs | ({"etag": etag} if etag else {})


def _upload_prefix(store: Store, prefix: str, source: str, expected: str | None, report: Report) -> dict[str, Any]:
    if os.path.lexists(source) and not os.path.isdir(source):
        raise StepFailure(
            f"{source} is not a directory: send it with 'key' instead of 'prefix'", code="not_a_directory"
        )
    entries = list_files(source, prefix)
    checked: dict[str, str] = {}
    if expected is not None:
        # All of it is read before any of it is sent: objects that were sent can't be taken back.
        for entry in entries:
            checked[entry.name] = _hash(_File.open(os.path.join(source, entry.name), entry.key))
        _compare(source, listing_sha256(checked.items()), expected)
    total = sum(entry.size for entry in entries)
    meter = Meter(total, report)
    digests: list[tuple[str, str]] = []
    with Workers(CONNECTIONS) as workers:
        small: deque[tuple[Entry, Future[tuple[str, str]]]] = deque()
        for entry in entries:
            path = os.path.join(source, entry.name)
            if entry.size <= PART_BYTES:
                send = partial(_send_small, store, path, entry, meter, workers.check, checked.get(entry.name))
                small.append((entry, workers.submit(send)))
            else:
                file = _File.open(path, entry.key, entry.size)
                digests.append((entry.name, _send(store, file, workers, meter, checked.get(entry.name))[0]))
            while len(small) > 2 * CONNECTIONS:
                sent, future = small.popleft()
                digests.append((sent.name, future.result()[0]))
        digests.extend((sent.name, future.result()[0]) for sent, future in small)
    return {"path": source, "bytes": total, "sha256": listing_sha256(digests), "objects": len(entries)}


@dataclass(slots=True)
class _File:
    """A file to send, open. It is closed when nothing refers to it any more, which may be a thread left behind."""

    path: str
    key: str
    size: int
    stream: io.FileIO

    @classmethod
    def open(cls, path: str, key: str, size: int | None = None) -> _File:
        """Open it. Raises StepFailure if it is no regular file, or not ``size`` bytes long."""
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            os.close(descriptor)
            raise StepFailure(f"{path} is not a file", code="not_a_file")
        if size is not None and info.st_size != size:
            os.close(descriptor)
            raise _changed(path)
        return cls(path, key, info.st_size, io.FileIO(descriptor))


class _Slice(io.RawIOBase):
    """A part of a file as a body that can be sent again. Reads at most a chunk at once."""

    def __init__(self, file: _File, offset: int, length: int, check: Callable[[], None]) -> None:
        self._file, self._offset, self._length, self._check = file, offset, length, check
        self._position = 0

    def __len__(self) -> int:
        return self._length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        self._check()
        left = max(0, self._length - self._position)
        wanted = min(left, CHUNK_BYTES if size is None or size < 0 else size)
        data = os.pread(self._file.stream.fileno(), wanted, self._offset + self._position)
        if wanted and not data:
            raise _changed(self._file.path)
        self._position += len(data)
        return data


def _send(store: Store, file: _File, workers: Workers, meter: Meter, expected: str | None) -> tuple[str, str]:
    """Send a file of any size; its SHA-256 and the object's tag."""
    if file.size <= PART_BYTES:
        return workers.submit(partial(_put, store, file, meter, workers.check, expected)).result()
    if file.size > _MAX_OBJECT_BYTES:
        raise StepFailure(f"{file.path} is larger than the 5 TiB that an object can have", code="too_large")
    with store.errors(store.object(file.key)):
        upload_id = store.client.create_multipart_upload(Bucket=store.bucket, Key=file.key, ContentType=_CONTENT_TYPE)[
            "UploadId"
        ]
    try:
        return _send_parts(store, file, workers, meter, expected, upload_id)
    except BaseException:
        workers.stop.set()
        _abort(store, file.key, upload_id)
        raise


def _abort(store: Store, key: str, upload_id: str) -> None:
    """Give the parts up: they would be kept, and paid for, without being seen.

    No more than a try, and not for long: the cause of the failure is what has to be told, and a cancelled
    step is killed soon.
    """

    def abort() -> None:
        with suppress(Exception):
            store.client.abort_multipart_upload(Bucket=store.bucket, Key=key, UploadId=upload_id)

    thread = threading.Thread(target=abort, daemon=True)
    thread.start()
    thread.join(_ABORT_S)


def _send_parts(
    store: Store, file: _File, workers: Workers, meter: Meter, expected: str | None, upload_id: str
) -> tuple[str, str]:
    part_bytes = max(PART_BYTES, math.ceil(file.size / (_MAX_PARTS * CHUNK_BYTES)) * CHUNK_BYTES)
    digest, tags = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    under_way: deque[Future[dict[str, Any]]] = deque()
    parts: list[dict[str, Any]] = []
    for number, offset in enumerate(range(0, file.size, part_bytes), start=1):
        length = min(part_bytes, file.size - offset)
        check = _digest_range(file, offset, length, digest)
        tags.update(check)
        body = _Slice(file, offset, length, workers.check)
        under_way.append(workers.submit(partial(_send_part, store, file.key, upload_id, number, body, check, meter)))
        while len(under_way) > CONNECTIONS:
            parts.append(under_way.popleft().result())
    parts.extend(future.result() for future in under_way)
    if expected is not None and digest.hexdigest() != expected.lower():
        raise _changed(file.path)
    etag = _complete(store, file, upload_id, parts, f"{tags.hexdigest()}-{len(parts)}")
    return digest.hexdigest(), etag


def _complete(store: Store, file: _File, upload_id: str, parts: list[dict[str, Any]], wanted: str) -> str:
    """Put the parts together; the object's tag. ``wanted`` is the tag that a store without encryption gives."""
    with store.errors(store.object(file.key)):
        try:
            answer = store.client.complete_multipart_upload(
                Bucket=store.bucket, Key=file.key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except store.client.exceptions.NoSuchUpload:
            # The answer to an earlier try may have been lost: then the upload is gone because it is complete.
            answer = store.client.head_object(Bucket=store.bucket, Key=file.key)
            if _tag(answer) != wanted:
                raise
    return _tag(answer)


def _send_part(
    store: Store, key: str, upload_id: str, number: int, body: _Slice, check: bytes, meter: Meter
) -> dict[str, Any]:
    with store.errors(store.object(key)):
        answer = store.client.upload_part(
            Bucket=store.bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=body,
            ContentLength=len(body), ContentMD5=base64.b64encode(check).decode(),
        )  # fmt: skip
    meter.add(len(body))
    return {"PartNumber": number, "ETag": answer["ETag"]}


def _send_small(
    store: Store, path: str, entry: Entry, meter: Meter, check: Callable[[], None], expected: str | None
) -> tuple[str, str]:
    return _put(store, _File.open(path, entry.key, entry.size), meter, check, expected)


def _put(store: Store, file: _File, meter: Meter, check: Callable[[], None], expected: str | None) -> tuple[str, str]:
    digest = hashlib.sha256()
    md5 = _digest_range(file, 0, file.size, digest)
    if expected is not None and digest.hexdigest() != expected.lower():
        raise _changed(file.path)
    with store.errors(store.object(file.key)):
        answer = store.client.put_object(
            Bucket=store.bucket, Key=file.key, Body=_Slice(file, 0, file.size, check), ContentLength=file.size,
            ContentMD5=base64.b64encode(md5).decode(), ContentType=_CONTENT_TYPE,
        )  # fmt: skip
    meter.add(file.size)
    return digest.hexdigest(), _tag(answer)


def _tag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag") or "").strip('"')


def _digest_range(file: _File, offset: int, length: int, sha256: Any) -> bytes:
    """The MD5 of a range, which the store compares with what it gets; ``sha256`` is fed on the way."""
    md5 = hashlib.md5(usedforsecurity=False)
    position, end = offset, offset + length
    while position < end:
        chunk = os.pread(file.stream.fileno(), min(CHUNK_BYTES, end - position), position)
        if not chunk:
            raise _changed(file.path)
        md5.update(chunk)
        sha256.update(chunk)
        position += len(chunk)
    return md5.digest()


def _hash(file: _File) -> str:
    digest = hashlib.sha256()
    _digest_range(file, 0, file.size, digest)
    return digest.hexdigest()


def _compare(source: str, digest: str, expected: str) -> None:
    if digest != expected.lower():
        raise StepFailure(
            f"{source} has SHA-256 {digest}, not {expected.lower()}; nothing was sent", code="checksum_mismatch"
        )


def _changed(path: str) -> StepFailure:
    return StepFailure(f"{path} was changed while it was being sent: stop what writes to it first", code="changed")
