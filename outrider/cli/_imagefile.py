"""Container images as one file with checksums, for nodes that reach no registry.

The file is a tar archive, so that it can be looked into, and used, without this program::

    images.tar.zst   what the engine's own ``save`` wrote, compressed: zstd -dc images.tar.zst | docker load
    images.json      which images these are, with the ids that an engine gives them
    SHA256SUMS       of the two: sha256sum -c SHA256SUMS

An engine's id of an image is the SHA-256 of its configuration, which names each layer by its SHA-256. So a file is only
believed where every id is that of the configuration inside, and every name is one that is listed; the engine itself
compares the layers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from outrider.errors import InvalidInput, PermanentError

FORMAT = 1
_PAYLOAD, _INDEX, _SUMS = "images.tar.zst", "images.json", "SHA256SUMS"
_BLOCK = 512  # of a tar archive
_CHUNK = 2**20
_SMALL = 4 * 2**20  # no configuration of an image is larger
_LEVEL = 3

Progress = Callable[[int], None]
"""Hears how many bytes are done."""


@dataclass(frozen=True, slots=True)
class SavedImage:
    """An image in a file: its name with the tag, the engine's id of it, its size in bytes, and ``linux/amd64``."""

    name: str
    id: str
    size_bytes: int
    platform: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file says of itself. ``unpacked_bytes``: what the engine is handed when it is loaded."""

    images: tuple[SavedImage, ...]
    made_by: str
    created: str
    sha256: str  # of the payload
    offset: int  # of the payload in the file
    packed_bytes: int
    unpacked_bytes: int


def write(path: Path, images: Iterable[SavedImage], chunks: Iterable[bytes], *, made_by: str, created: str) -> Contents:
    """Write ``chunks``, the engine's archive of ``images``, to ``path``, which appears whole or not at all.

    What was written is read again and compared with ``images``: PermanentError if the engine saved others. The file
    system's errors come as PermanentError, too.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise PermanentError(f"{path} can't be written: {error.strerror}", code="not_writable") from error
    try:
        with os.fdopen(handle, "w+b") as file:
            contents = _write(file, tuple(images), chunks, made_by, created)
            file.flush()
            try:
                _check_images(file, contents)
            except InvalidInput as error:
                raise PermanentError(
                    f"the engine saved other images than were asked for: {error.message}", hint="try again"
                ) from error
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise PermanentError(f"{path} can't be written: {error.strerror}", code="not_writable") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return contents


def verify(file: IO[bytes], name: str, on_progress: Progress | None = None) -> Contents:
    """What is in ``file``, after everything that can be wrong with it was looked for. InvalidInput says what is."""
    try:
        contents = _index(file)
        digest = hashlib.sha256()
        done = 0
        for chunk in _range(file, contents.offset, contents.packed_bytes):
            digest.update(chunk)
            done += len(chunk)
            if on_progress is not None:
                on_progress(done)
        if done != contents.packed_bytes or digest.hexdigest() != contents.sha256:
            raise InvalidInput("its images are not the bytes that were saved", hint="it was damaged: bring it again")
        _check_images(file, contents)
    except InvalidInput as error:
        raise InvalidInput(
            f"{name} can't be loaded: {error.message}", code="image_file_damaged", hint=error.hint
        ) from error
    return contents


def payload(file: IO[bytes], contents: Contents) -> Iterator[bytes]:
    """What to hand to the engine. If the file was changed meanwhile, InvalidInput comes before the last bytes."""
    reader = _Hashing(file, contents.offset, contents.packed_bytes)
    held = b""
    changed = InvalidInput("the file was changed while it was being loaded", code="image_file_damaged")
    try:
        with zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", reader), closefd=False) as unpacked:
            while chunk := unpacked.read(_CHUNK):
                if held:
                    yield held
                held = chunk
    except zstandard.ZstdError as error:
        raise changed from error
    if reader.digest.hexdigest() != contents.sha256:
        raise changed
    yield held


def sha256_of(path: Path) -> str:
    """Of the whole file, as sha256sum says it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- writing


def _write(
    file: IO[bytes], images: tuple[SavedImage, ...], chunks: Iterable[bytes], made_by: str, created: str
) -> Contents:
    file.write(bytes(_BLOCK))  # the payload's header, once its size is known
    sink = _HashingSink(file)
    unpacked = 0
    with zstandard.ZstdCompressor(level=_LEVEL, threads=-1).stream_writer(
        cast("IO[bytes]", sink), closefd=False
    ) as packer:
        for chunk in chunks:
            unpacked += len(chunk)
            packer.write(chunk)
    packed, sha256 = sink.written, sink.digest.hexdigest()
    file.write(bytes(-packed % _BLOCK))
    contents = Contents(images, made_by, created, sha256, _BLOCK, packed, unpacked)
    index = {"format": FORMAT, **asdict(contents), "file": _PAYLOAD}
    del index["offset"]
    text = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    sums = f"{sha256}  {_PAYLOAD}\n{hashlib.sha256(text).hexdigest()}  {_INDEX}\n".encode()
    for name, data in ((_INDEX, text), (_SUMS, sums)):
        file.write(_header(name, len(data)) + data + bytes(-len(data) % _BLOCK))
    file.write(bytes(2 * _BLOCK))
    file.seek(0)
    file.write(_header(_PAYLOAD, packed))
    return contents


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)  # one block for any size


class _HashingSink(io.RawIOBase):
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.written += len(data)
        self._file.write(data)
        return len(data)


# -- reading


def _index(file: IO[bytes]) -> Contents:
    other = "it is not a file of `outrider images save`"
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            entries = {entry.name: entry for entry in archive.getmembers()}
            if set(entries) != {_PAYLOAD, _INDEX, _SUMS} or not all(entry.isreg() for entry in entries.values()):
                raise InvalidInput(other)
            if max(entries[_INDEX].size, entries[_SUMS].size) > _SMALL:
                raise InvalidInput(other)
            text, sums = (archive.extractfile(entries[name]).read() for name in (_INDEX, _SUMS))  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError) as error:
        raise InvalidInput(other, hint="or it was cut off: bring it again") from error
    lines = [line.partition("  ") for line in sums.decode("ascii", "replace").splitlines()]
    known = {name: digest for digest, _, name in lines}
    if known.get(_INDEX) != hashlib.sha256(text).hexdigest():
        raise InvalidInput(f"its {_INDEX} does not fit its {_SUMS}", hint="it was damaged: bring it again")
    try:
        index = json.loads(text)
        if index["format"] != FORMAT:
            raise InvalidInput(f"it has the format {index['format']}", hint="it is of another version of outrider")
        images = tuple(SavedImage(**image) for image in index["images"])
        contents = Contents(
            images=images,
            made_by=str(index["made_by"]),
            created=str(index["created"]),
            sha256=str(index["sha256"]),
            offset=entries[_PAYLOAD].offset_data,
            packed_bytes=int(index["packed_bytes"]),
            unpacked_bytes=int(index["unpacked_bytes"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"its {_INDEX} can't be read: {error}") from error
    if known.get(_PAYLOAD) != contents.sha256 or entries[_PAYLOAD].size != contents.packed_bytes:
        raise InvalidInput(f"its {_PAYLOAD} does not fit its {_INDEX}", hint="it was damaged: bring it again")
    return contents


def _check_images(file: IO[bytes], contents: Contents) -> None:
    """That the engine's archive has the images that are listed, with these ids, and no others."""
    digests: dict[str, str] = {}
    manifest = b"[]"
    try:
        with _unpacked(file, contents) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for entry in archive:
                if not entry.isreg() or entry.size > _SMALL:
                    continue
                content = archive.extractfile(entry).read()  # type: ignore[union-attr]
                digests[entry.name] = f"sha256:{hashlib.sha256(content).hexdigest()}"
                if entry.name == "manifest.json":
                    manifest = content
        described = {
            tag: digests.get(str(image.get("Config")), "")
            for image in json.loads(manifest)
            for tag in image.get("RepoTags") or ("an image without a name",)
        }
    except (tarfile.TarError, zstandard.ZstdError, ValueError, AttributeError, TypeError, EOFError) as error:
        raise InvalidInput(f"what is in it is no archive of images ({error})") from error
    listed = {image.name: image.id for image in contents.images}
    if described != listed:
        wrong = sorted(name for name in described.keys() | listed.keys() if described.get(name) != listed.get(name))
        raise InvalidInput(f"its list of images and its images differ: {', '.join(wrong)}")


@contextmanager
def _unpacked(file: IO[bytes], contents: Contents) -> Iterator[IO[bytes]]:
    reader = _Hashing(file, contents.offset, contents.packed_bytes)
    with zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", reader), closefd=False) as unpacked:
        yield _AtMost(unpacked, contents.unpacked_bytes)  # type: ignore[misc]


def _range(file: IO[bytes], offset: int, size: int) -> Iterator[bytes]:
    reader = _Hashing(file, offset, size)
    while chunk := reader.read(_CHUNK):
        yield chunk


class _Hashing(io.RawIOBase):
    """A part of a file, hashed as it is read."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self._file = file
        self._left = size
        self.digest = hashlib.sha256()
        file.seek(offset)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        self.digest.update(data)
        return data


class _AtMost:
    """A stream that was promised to have so many bytes: what is longer is refused before it fills anything."""

    def __init__(self, stream: Any, size: int) -> None:
        self._stream = stream
        self._left = size

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise InvalidInput("it unpacks to more than it says")
        return data


def refuse_digest(path: Path, wanted: str) -> None:
    """Raise InvalidInput unless the whole file has the SHA-256 ``wanted``."""
    found = sha256_of(path)
    if found != wanted.strip().lower().removeprefix("sha256:"):
        raise InvalidInput(
            f"{path} has the SHA-256 {found}, not {wanted}", code="image_file_damaged", hint="bring it again"
        )
