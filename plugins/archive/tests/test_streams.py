"""The decompressing stream gives what went in, whatever sizes it is asked for; and knows each place where it is cut."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": zstd.compress,
}


@pytest.fixture(scope="module")
def streams() -> ModuleType:
    program = str(Path(__file__).parents[1] / "program")
    sys.path.insert(0, program)
    try:
        return importlib.import_module("archiving.streams")
    finally:
        sys.path.remove(program)


def content(seed: int, size: int) -> bytes:
    """Noise, text and zeros in turn: blocks that are stored, compressed and repeated."""
    source = random.Random(seed)
    pieces = [source.randbytes(size // 3), b"the same again " * (size // 45), bytes(size // 3)]
    source.shuffle(pieces)
    return b"".join(pieces)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(COMPRESS)),
    sizes=st.lists(st.integers(0, 1_500_000), min_size=1, max_size=3),
    asked=st.sampled_from([512, 10_240, 131_072, 262_144, 1_000_003]),
    chunk=st.sampled_from([1_000, 131_072, 131_075, 131_078, 262_144]),
    seed=st.integers(0, 1000),
)
def test_what_went_in_comes_out(
    streams: ModuleType, kind: str, sizes: list[int], asked: int, chunk: int, seed: int
) -> None:
    setattr(streams, "CHUNK", chunk)  # noqa: B010  (mypy) where the source's pieces end matters as well
    parts = [content(seed, size) for size in sizes]
    source = io.BytesIO(b"".join(COMPRESS[kind](part) for part in parts))
    stream = streams.Decompressing(source, kind)
    found = bytearray()
    while data := stream.read(asked):
        assert len(data) <= asked
        found += data
    assert bytes(found) == b"".join(parts)


@pytest.mark.parametrize("kind", sorted(COMPRESS))
@pytest.mark.parametrize("asked", [512, 131_072])
def test_decoder_that_gives_nothing_for_once_is_not_at_its_end(
    streams: ModuleType, kind: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece of the source that ends with a block leaves the decoder nothing but that block's mark to give."""
    noise = random.Random(1).randbytes(300_000)
    for data in (noise, bytes(300_000) + noise):
        packed = COMPRESS[kind](data)
        for chunk in (1_003, *range(131_069, 131_110)):
            monkeypatch.setattr(streams, "CHUNK", chunk)
            stream = streams.Decompressing(io.BytesIO(packed), kind)
            size = 0
            while found := stream.read(asked):
                size += len(found)
            assert size == len(data), chunk


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(COMPRESS)), seed=st.integers(0, 1000), part=st.floats(0, 1, exclude_max=True))
def test_every_cut_is_noticed(streams: ModuleType, kind: str, seed: int, part: float) -> None:
    whole = COMPRESS[kind](content(seed, 400_000))
    stream = streams.Decompressing(io.BytesIO(whole[: int(len(whole) * part)]), kind)

    def read_all() -> None:
        while stream.read(65_536):
            pass

    with pytest.raises(streams.Truncated):
        read_all()


@pytest.mark.parametrize("kind", sorted(COMPRESS))
def test_what_was_decoded_ahead_comes_before_what_is_wrong_behind_it(streams: ModuleType, kind: str) -> None:
    whole = content(1, 9_000_000)
    packed = COMPRESS[kind](whole)
    decoder = streams.Decoder(io.BytesIO(packed[:-5]), kind)
    try:
        stream = streams.Incoming(decoder.fetch)
        read = bytearray(stream.exactly(1_000_000, "the beginning"))
        with pytest.raises(streams.Truncated):
            _drain(stream, read)
    finally:
        decoder.close()
    assert len(read) > 7_000_000
    assert whole.startswith(read)


def test_a_decoder_ends_when_nobody_reads_on(streams: ModuleType) -> None:
    before = threading.active_count()
    decoder = streams.Decoder(io.BytesIO(gzip.compress(bytes(50_000_000))), "tar.gz")
    assert decoder.fetch()
    decoder.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", sorted(COMPRESS))
def test_a_decoder_of_endless_nothing_can_be_ended(streams: ModuleType, kind: str) -> None:
    class Nothing(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return COMPRESS[kind](b"")

    decoder = streams.Decoder(Nothing(), kind)
    time.sleep(0.05)
    decoder.close()


def _drain(stream: Any, into: bytearray) -> None:
    while view := stream.upto(100_000):
        into += view
