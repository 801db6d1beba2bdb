"""http.download: fetch, in ranges side by side where that is faster, go on where it was cut, check, and only then
publish."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from outrider_stepkit import Meter, StepFailure, free_bytes

from http_transfer.client import Client
from http_transfer.connection import Answer
from http_transfer.digest import Follower
from http_transfer.failures import HttpFailure
from http_transfer.helpers import Content, Helpers, write_at
from http_transfer.partial import Partial, partial_file
from http_transfer.patience import persist
from http_transfer.pieces import ENDLESS, Claim, Pieces
from http_transfer.ranges import continues, range_header, strong_validator

_CHUNK_BYTES = 1024**2
_NOTE_BYTES, _NOTE_S = 64 * 1024**2, 2.0
_WRITE_OUT_BYTES = 16 * 1024**2
_WAIT_S = 0.5
_ALONE_S, _WORTH_S = 1.0, 2.0

Report = Callable[[int, int | None, str], None]


def download(params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Fetch ``params["url"]``; the outputs of the step. ``report(done, total, rate)`` gets bytes.

    Raises StepFailure or OSError; then nothing has changed at the target.
    """
    client = Client(params, env)
    target = _target(params["to"], params["url"], client.shown)
    expected = {name: params[name].lower() for name in ("sha256", "sha512") if params.get(name)}
    wanted = [*expected, *(name for name in params.get("digests", ["sha256"]) if name not in expected)]
    with partial_file(Path(target)) as partial:
        transfer = _Transfer(client, partial, params, expected, wanted, report)
        try:
            found = transfer.run()
            if transfer.resumed and any(found[name] != digest for name, digest in expected.items()):
                # What a former attempt left may be to blame: once more, from the first byte.
                transfer.start_over()
                found = transfer.run()
            for name, digest in expected.items():
                if found[name] != digest:
                    raise StepFailure(
                        f"the content of {client.shown} has {name.upper()[:3]}-{name[3:]} {found[name]}, not {digest}; "
                        "nothing was published",
                        code="checksum_mismatch",
                    )
            partial.publish(transfer.size)
        finally:
            transfer.stop()
    outputs = {"path": target, "bytes": transfer.size, **found}
    return outputs | ({"etag": transfer.etag} if transfer.etag else {})


def _target(to: str, url: str, shown: str) -> str:
    if to.endswith("/"):
        name = unquote(urlsplit(url).path.rsplit("/", 1)[-1])
        if name in {"", ".", ".."} or "/" in name or not name.isprintable() or len(os.fsencode(name)) > 255:
            raise StepFailure(f"{shown} does not end with the name of a file: give one in 'to'", code="no_file_name")
        to += name
    if os.path.isdir(to):
        raise StepFailure(
            f"{to} is a directory: name the file, or end 'to' with a slash to keep the address's name",
            code="is_a_directory",
        )
    return to


class _Transfer:
    """What has been fetched so far, and which version of the content it belongs to."""

    def __init__(
        self,
        client: Client,
        partial: Partial,
        params: Mapping[str, Any],
        expected: Mapping[str, str],
        wanted: Iterable[str],
        report: Report,
    ) -> None:
        self._client, self._partial, self._wanted = client, partial, tuple(wanted)
        self._connections = int(params.get("connections", 4))
        self._limit: int | None = params.get("limit_bytes_per_s")
        self._stop = threading.Event()
        self._meter = Meter(None, report, limit=self._limit, stop=self._stop)
        # The same content is what has the same checksum; without one, what the same address and validator say.
        address = hashlib.sha256(client.start.url.whole().encode()).hexdigest()
        self._of = " ".join(f"{name}={digest}" for name, digest in sorted(expected.items())) or f"url={address}"
        # Slow by wish, it takes little at a time: a server that waits long for its turn gives up.
        size = _CHUNK_BYTES if self._limit is None else min(_CHUNK_BYTES, max(16 * 1024, self._limit // 4))
        self._buffer = memoryview(bytearray(size))
        self._pieces: Pieces | None = None
        self._validator: str | None = None
        self._follower: Follower | None = None
        self._helpers: Helpers | None = None
        self._alone_since = self._noted_at = time.monotonic()
        self._noted = 0
        self._furthest = 0
        self.etag: str | None = None
        self.size = 0
        self.resumed = False
        """Whether some of it is from a former attempt."""

    def run(self) -> dict[str, str]:
        """Fetch everything; the digests by their names."""
        known = self._partial.known(self._of)
        if known is None:
            self._partial.forget()
        else:
            self.resumed, self._validator, self.etag = True, known.validator, known.etag
            self._begin(known.total, known.missing)
        pieces = persist(self._go_on, lambda: self._furthest, lambda error: True)
        assert self._follower is not None
        self._meter.total = self.size = pieces.total
        self._meter.skip(0)  # says that it is at its end
        return self._follower.result(self.size)

    def stop(self) -> None:
        """End all threads. Idempotent."""
        self._stop.set()
        for thread in (self._helpers, self._follower):
            if thread is not None:
                thread.stop()
        self._helpers = self._follower = None
        self._client.wire.close()

    def start_over(self) -> None:
        """Nothing is there."""
        for thread in (self._helpers, self._follower):
            if thread is not None:
                thread.stop()
        self._helpers = self._follower = self._pieces = self._validator = None
        self._partial.forget()
        self._noted, self.resumed = 0, False
        self._meter.skip(-self._meter.done)

    def _begin(self, total: int, missing: list[tuple[int, int]] | None = None) -> Pieces:
        self._pieces = pieces = Pieces(total, missing)
        self._follower = Follower(self._partial.descriptor, pieces, self._wanted)
        self._meter.total = None if total == ENDLESS else total
        self._meter.skip(pieces.done() - self._meter.done)
        self._alone_since = time.monotonic()
        return pieces

    def _go_on(self) -> Pieces:
        """Fetch what is missing. Raises HttpFailure when it is cut; called again it goes on, or starts over."""
        if self._pieces is not None and not self._validator:
            self.start_over()
        try:
            while self._pieces is None or self._pieces.missing():
                self._fetch(self._pieces)
        finally:
            self._keep_note(_NOTE_BYTES // 64)
        return self._pieces

    def _fetch(self, pieces: Pieces | None) -> None:
        """One answer, and what it brings; or a moment's wait for what others fetch."""
        claim = pieces.claim(1 + self._helping) if pieces is not None else None
        if pieces is not None and claim is None:
            pieces.wait_for_change(_WAIT_S)
            self._look_around()
            return
        try:
            answer = self._ask(claim)
            if answer.status == 200:
                pieces = self._begin_with(answer)
                claim = pieces.claim(at=0)
            assert pieces is not None
            with closing(answer):
                self._check_room()
                while claim is not None:
                    claim = self._receive(answer, pieces, claim)
        finally:
            if pieces is not None and claim is not None:
                pieces.give_back(claim)

    def _ask(self, claim: Claim | None) -> Answer:
        """An answer whose body begins where the claim does, or one with everything."""
        headers = {}
        if claim is not None and self._validator and self._meter.done:
            # If-Range: what has changed meanwhile is sent whole instead of a part of something else.
            headers = {"Range": range_header(claim.at), "If-Range": self._validator}
        try:
            answer = self._client.send("GET", headers)
        except HttpFailure as error:
            if error.status != 416:
                raise
            raise self._changed("has no such range any more") from error
        if answer.status == 200:
            return answer
        if answer.status != 206 or claim is None or not headers:
            answer.close()
            raise HttpFailure(
                f"{self._client.shown} answered with status {answer.status} instead of content", code="refused"
            )
        assert self._pieces is not None
        if not continues(answer.headers, claim.at, self._pieces.total, self.etag):
            answer.close()
            raise self._changed("answered with another range than was asked for")
        return answer

    def _changed(self, how: str) -> HttpFailure:
        self.start_over()
        return HttpFailure(f"{self._client.shown} {how}", code="changed", temporary=True)

    def _begin_with(self, answer: Answer) -> Pieces:
        self.start_over()
        self.etag = answer.headers.get("ETag")
        # What has no length can't be gone on with: nobody would know where it ends.
        self._validator = None if answer.length is None else strong_validator(answer.headers)
        return self._begin(ENDLESS if answer.length is None else answer.length)

    def _receive(self, answer: Answer, pieces: Pieces, claim: Claim) -> Claim | None:
        """Write down what arrives next. The claim with what follows it; None if that is somebody else's, or the end."""
        at = claim.at
        count = answer.fill(self._buffer[: min(claim.end - at, len(self._buffer))])
        if not count:
            if pieces.total != ENDLESS:
                raise HttpFailure(f"the connection to {self._client.shown} broke", code="cut", temporary=True)
            pieces.end_at(at)
            return None
        write_at(self._partial.descriptor, self._buffer[:count], at)
        pieces.arrived(claim, count)
        self._meter.add(count)
        if (at + count) // _WRITE_OUT_BYTES > at // _WRITE_OUT_BYTES:
            end = (at + count) // _WRITE_OUT_BYTES * _WRITE_OUT_BYTES
            self._partial.write_out(end - _WRITE_OUT_BYTES, end)
        self._look_around()
        self._keep_note(_NOTE_BYTES)
        return claim if claim.at < claim.end else pieces.claim(1 + self._helping, at=claim.end)

    @property
    def _helping(self) -> int:
        return self._helpers.running if self._helpers is not None else 0

    def _look_around(self) -> None:
        """Take note of what others have fetched; get help where the server knows ranges and one takes its time."""
        self._furthest = max(self._furthest, self._meter.done)
        if self._helpers is not None:
            self._helpers.check()
            return
        if self._pieces is None or not self._validator or self._connections < 2:
            return
        rate = self._meter.rate
        alone_s, left_s = time.monotonic() - self._alone_since, (self._pieces.total - self._meter.done) / max(rate, 1)
        slow_by_wish = self._limit is not None and rate > 0.8 * self._limit
        if alone_s > _ALONE_S and left_s > _WORTH_S and not slow_by_wish:
            content = Content(self._client.route, self._validator, self.etag)
            self._helpers = Helpers(
                self._connections - 1, self._client, content, self._pieces, self._partial.descriptor, self._meter
            )

    def _keep_note(self, after_bytes: int) -> None:
        if self._pieces is None or not self._validator:
            return
        if self._meter.done - self._noted >= after_bytes or time.monotonic() - self._noted_at > _NOTE_S:
            self._noted, self._noted_at = self._meter.done, time.monotonic()
            self._partial.note(self._of, self._validator, self.etag, self._pieces.total, self._pieces.missing())

    def _check_room(self) -> None:
        if self._meter.total is None:
            return
        missing = self._meter.total - self._meter.done
        if missing > (free := free_bytes(self._partial.target.parent)):
            raise StepFailure(
                f"{missing} bytes are to be downloaded and the volume has room for {free}: give it a larger size",
                code="volume_full",
            )
