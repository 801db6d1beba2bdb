"""More connections for one download: each fetches ranges that nobody else does, in a thread of its own.

They only ever help. One that gets nowhere goes away, and what it had is fetched by the others; all that they
report is content that has changed.
"""

from __future__ import annotations

import os
import threading
from contextlib import closing
from dataclasses import dataclass

from outrider_stepkit import Meter, StepFailure

from http_transfer.client import Client, Route
from http_transfer.connection import Wire
from http_transfer.failures import HttpFailure
from http_transfer.patience import MAX_RETRIES, wait_s
from http_transfer.pieces import Claim, Pieces
from http_transfer.ranges import continues, range_header

_CHUNK_BYTES = 512 * 1024
_LOOK_S = 0.5
_END_S = 15.0


@dataclass(frozen=True, slots=True)
class Content:
    """Where it is, and which version of it."""

    route: Route
    validator: str
    etag: str | None


class Helpers:
    """``count`` threads that fetch ``pieces`` of ``content`` into a file."""

    def __init__(
        self, count: int, client: Client, content: Content, pieces: Pieces, descriptor: int, meter: Meter
    ) -> None:
        self._client, self._content, self._pieces, self._meter = client, content, pieces, meter
        # Its own, so that a thread that ends late never writes to what has come to stand behind the number.
        self._descriptor = os.dup(descriptor)
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._wires = [client.another_wire() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._run, args=(wire,), name="range", daemon=True) for wire in self._wires
        ]
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def check(self) -> None:
        """Raises what makes the whole download fail or start over."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Have all of them end. What they were at is given back. Idempotent."""
        self._stop.set()
        for wire in self._wires:
            wire.abort()
        for thread in self._threads:
            thread.join(_END_S)  # one that still looks a name up has nothing to write any more
        if self._descriptor >= 0 and not self.running:
            os.close(self._descriptor)
            self._descriptor = -1

    def _run(self, wire: Wire) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        retry = 0
        with closing(wire):
            while not self._stop.is_set() and retry <= MAX_RETRIES:
                claim = self._pieces.claim(1 + len(self._threads))
                if claim is None:
                    if not self._pieces.missing():
                        return
                    self._pieces.wait_for_change(_LOOK_S)
                    continue
                begun = claim.at
                try:
                    self._fetch(wire, claim, buffer)
                    retry = 0
                except HttpFailure as error:
                    if error.code == "changed":
                        self._failure = error
                    if error.code == "changed" or not error.temporary or error.status:
                        return  # a server that answers that it is too much, too, is left alone
                    retry = 1 if claim.at > begun else retry + 1
                    self._stop.wait(wait_s(retry))
                except (StepFailure, OSError) as error:
                    self._failure = None if self._stop.is_set() else error
                    return
                finally:
                    self._pieces.give_back(claim)

    def _fetch(self, wire: Wire, claim: Claim, buffer: memoryview) -> None:
        content, shown = self._content, self._content.route.url.shown
        headers = {"Range": range_header(claim.at, claim.end), "If-Range": content.validator}
        answer = self._client.send_to(wire, content.route, "GET", headers)
        if answer.status == 200 and answer.headers.get("ETag") != content.etag:
            raise HttpFailure(f"{shown} was replaced while it was fetched", code="changed", temporary=True)
        if answer.status != 206 or not continues(answer.headers, claim.at, self._pieces.total, content.etag):
            raise HttpFailure(f"{shown} does not give the range that was asked for", code="refused")
        while claim.at < claim.end and not self._stop.is_set():
            at = claim.at
            count = answer.fill(buffer[: min(claim.end - at, len(buffer))])
            if not count:
                raise HttpFailure(f"the connection to {shown} broke", code="cut", temporary=True)
            if self._stop.is_set():
                return
            write_at(self._descriptor, buffer[:count], at)
            self._pieces.arrived(claim, count)
            self._meter.add(count)


def write_at(descriptor: int, data: memoryview, at: int) -> None:
    """Write all of ``data`` at an offset. Raises OSError."""
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count
