"""http.download: fetch, resume when cut, check, and only then publish."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import requests
from outrider_stepkit import StepFailure, free_bytes, staged_file
from requests import exceptions as failed
from urllib3 import exceptions as transport

from http_transfer.client import Client, HttpFailure, persist, translated

_CHUNK_BYTES = 1024**2

Report = Callable[[int, int | None], None]


def download(params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Fetch ``params["url"]``; the outputs of the step. ``report(done, total)`` gets bytes.

    Raises StepFailure or OSError; then nothing has changed at the target.
    """
    client = Client(params, env)
    target = _target(params["to"], params["url"], client.shown)
    expected = params.get("sha256")
    with staged_file(target) as file:
        copy = _Copy(client, file, Path(target), report)
        persist(copy.go_on, lambda: copy.furthest, lambda error: True)
        digest = copy.digest.hexdigest()
        if expected is not None and digest != expected.lower():
            raise StepFailure(
                f"the content of {client.shown} has SHA-256 {digest}, not {expected.lower()}; nothing was published",
                code="checksum_mismatch",
            )
    outputs = {"path": target, "bytes": copy.done, "sha256": digest}
    return outputs | ({"etag": copy.etag} if copy.etag else {})


def _target(to: str, url: str, shown: str) -> str:
    if to.endswith("/"):
        name = unquote(urlsplit(url).path.rsplit("/", 1)[-1])
        if name in {"", ".", ".."} or "/" in name or not name.isprintable():
            raise StepFailure(f"{shown} does not end with the name of a file: give one in 'to'", code="no_file_name")
        to += name
    if os.path.isdir(to):
        raise StepFailure(
            f"{to} is a directory: name the file, or end 'to' with a slash to keep the address's name",
            code="is_a_directory",
        )
    return to


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer whose body continues the copy."""

    response: requests.Response
    total: int | None


class _Copy:
    """What has been fetched so far: bytes, their digest, and which version of the content they belong to."""

    def __init__(self, client: Client, file: BinaryIO, target: Path, report: Report) -> None:
        self._client, self._file, self._target, self._report = client, file, target, report
        self._validator: str | None = None
        self._total: int | None = None
        self.digest = hashlib.sha256()
        self.done = 0
        self.furthest = 0  # counts what was fetched before starting over, too
        self.etag: str | None = None

    def go_on(self) -> None:
        """Fetch what is missing. Raises HttpFailure when it is cut; called again it resumes, or starts over."""
        if not self._validator:
            self._start_over()
        answer = self._ask()
        with closing(answer.response):
            self._total = answer.total
            self._check_room()
            self._drain(answer.response)
        if self._total is not None and self.done != self._total:
            raise HttpFailure(f"the connection to {self._client.shown} broke", code="cut", temporary=True)
        self._report(self.done, self.done)

    def _ask(self) -> _Answer:
        headers = {}
        if self.done and self._validator:
            # If-Range: what has changed meanwhile is sent whole instead of a part of something else.
            headers = {"Range": f"bytes={self.done}-", "If-Range": self._validator}
        try:
            response = self._client.send("GET", headers)
        except HttpFailure as error:
            if error.status != 416:
                raise
            self._start_over()
            response = self._client.send("GET")
        if response.status_code == 206:
            return _Answer(response, self._continued(response))
        if response.status_code != 200:
            response.close()
            raise HttpFailure(
                f"{self._client.shown} answered with status {response.status_code} instead of content", code="refused"
            )
        if self.done:
            self._start_over()
        self.etag = response.headers.get("ETag")
        self._validator = _strong_validator(response)
        length = response.headers.get("Content-Length", "")
        chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
        return _Answer(response, int(length) if length.isdigit() and not chunked else None)

    def _continued(self, response: requests.Response) -> int | None:
        """The whole length that a 206 tells. It has to begin exactly where the copy ends."""
        given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        other = response.headers.get("ETag") not in {None, self.etag}
        if not given or int(given[1]) != self.done or not self.done or other:
            response.close()
            self._start_over()
            raise HttpFailure(
                f"{self._client.shown} answered with another range than was asked for", code="changed", temporary=True
            )
        return int(given[3]) if given[3] != "*" else self._total

    def _drain(self, response: requests.Response) -> None:
        while True:
            try:
                # read1: what arrived before a cut counts, instead of being lost with the rest of a chunk.
                chunk = response.raw.read1(_CHUNK_BYTES, decode_content=False)
            except (failed.RequestException, transport.HTTPError, OSError) as error:
                raise translated(error, self._client.url) from error
            if not chunk:
                return
            self._file.write(chunk)
            self.digest.update(chunk)
            self.done += len(chunk)
            self.furthest = max(self.furthest, self.done)
            self._report(self.done, self._total)

    def _start_over(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.digest = hashlib.sha256()
        self.done = 0
        self._validator = None

    def _check_room(self) -> None:
        missing = (self._total or 0) - self.done
        if missing > (free := free_bytes(self._target.parent)):
            raise StepFailure(
                f"{missing} bytes are to be downloaded and the volume has room for {free}: give it a larger size",
                code="volume_full",
            )


def _strong_validator(response: requests.Response) -> str | None:
    """What If-Range may carry (RFC 9110, 13.1.5), or None: then a cut download has to start over."""
    if response.headers.get("Accept-Ranges", "").strip().lower() == "none":
        return None
    etag = response.headers.get("ETag")
    if etag:
        return None if etag.startswith("W/") else etag
    modified = response.headers.get("Last-Modified")
    # A date is only strong when it is not as young as the answer: it has a resolution of a second.
    return modified if modified and modified != response.headers.get("Date") else None
