"""Decompression in pieces, against the one promise that decoders make about `needs_input`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "program"


class Hesitant:
    """A decoder that wants no input, gives nothing, and only then wants some: what zstd does between two blocks."""

    def __init__(self) -> None:
        self.eof = False
        self.unused_data = b""
        self.needs_input = True
        self._hesitated = False

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data == b"first":
            self.needs_input = False
            return b"1"
        if not self._hesitated:
            self._hesitated = True
            self.needs_input = True
            return b""
        self.eof = data == b"second"
        return b"2" if data else b""


class Source(io.BytesIO):
    """Two reads with something in them, then the end, or the end at once."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__()
        self._pieces = list(pieces)

    def read(self, size: int | None = -1) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(PROGRAM))
    from archiving import streams  # type: ignore[import-not-found]

    monkeypatch.setitem(streams._KINDS, "hesitant", (Hesitant, b"magic"))
    yield streams
    for name in [name for name in sys.modules if name.split(".")[0] == "archiving"]:
        del sys.modules[name]


def test_a_decoder_that_gives_nothing_for_once_is_not_taken_for_the_end(streams: object) -> None:
    stream = streams.Decompressing(Source(b"first", b"second"), "hesitant")  # type: ignore[attr-defined]
    assert stream.read(10) + stream.read(10) == b"12"


def test_a_source_that_ends_within_a_frame_is_truncated(streams: object) -> None:
    stream = streams.Decompressing(Source(b"first"), "hesitant")  # type: ignore[attr-defined]
    assert stream.read(10) == b"1"
    with pytest.raises(streams.Truncated):  # type: ignore[attr-defined]
        stream.read(10)
