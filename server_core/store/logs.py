"""Logs of runs: every byte once, in order per stream, placed by its offset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import zstandard
from sqlalchemy import Connection, Row, Select, insert, select

from outrider.errors import InvalidInput
from outrider.v1 import node_service_pb2, types_pb2
from server_core.store import runs, schema
from server_core.store.common import micros, stamp

MAX_CHUNK_BYTES = 4 * 1024 * 1024

_LOGS = schema.run_logs.c
_Key = tuple[str, str, int, int]
_LogRow = Row[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk whose length is known."""

    chunk: types_pb2.RunLogChunk
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class Appended:
    """How far each log is stored now, and which chunks did not follow on what was there."""

    positions: tuple[node_service_pb2.RunLogAck.Position, ...]
    loose: tuple[types_pb2.RunLogChunk, ...]
    foreign: tuple[str, ...]  # run ids that are not this node's


def measure(chunk: types_pb2.RunLogChunk) -> Piece:
    """Check a chunk by itself. Raises InvalidInput."""
    if chunk.stream not in (types_pb2.LOG_STREAM_STDOUT, types_pb2.LOG_STREAM_STDERR):
        raise InvalidInput(f"a log chunk of {chunk.run_id} names no stream", code="bad_log_chunk")
    if chunk.offset < 0 or chunk.gap_bytes < -1:
        raise InvalidInput(f"a log chunk of {chunk.run_id} has a negative place", code="bad_log_chunk")
    if chunk.gap_bytes:
        return Piece(chunk, max(chunk.gap_bytes, 0))
    if not chunk.zstd:
        return Piece(chunk, len(chunk.data))
    return Piece(chunk, len(unpack(chunk.data)))


def unpack(data: bytes) -> bytes:
    """zstd's original. Raises InvalidInput if it is damaged or has more than 4 MiB."""
    try:
        # A frame may lie about its size: the stream reader stops at ours.
        raw = zstandard.ZstdDecompressor().stream_reader(data).read(MAX_CHUNK_BYTES + 1)
    except zstandard.ZstdError as error:
        raise InvalidInput(f"a log chunk can't be unpacked: {error}", code="bad_log_chunk") from error
    if len(raw) > MAX_CHUNK_BYTES:
        raise InvalidInput(f"a log chunk has more than {MAX_CHUNK_BYTES} bytes", code="bad_log_chunk")
    return raw


def append(connection: Connection, node_id: str, pieces: Iterable[Piece]) -> Appended:
    """Store what follows on what is there; what is there already is passed over."""
    ends: dict[_Key, int] = {}
    loose: list[types_pb2.RunLogChunk] = []
    owned: dict[str, bool] = {}
    for piece in pieces:
        chunk = piece.chunk
        if chunk.run_id not in owned:
            row = runs.row_of(connection, chunk.run_id)
            owned[chunk.run_id] = row is not None and row.node_id == node_id
        if not owned[chunk.run_id]:
            continue
        key = (chunk.run_id, chunk.step, chunk.attempt, chunk.stream)
        if key not in ends:
            ends[key] = end_of(connection, *key)
        if chunk.offset > ends[key]:
            loose.append(chunk)
            continue
        ends[key] = _append_one(connection, key, ends[key], piece)
    positions = tuple(
        node_service_pb2.RunLogAck.Position(run_id=run_id, step=step, attempt=attempt, stream=stream, offset=end)  # type: ignore[arg-type]  # the stub wants the enum's own type, the store has its number
        for (run_id, step, attempt, stream), end in ends.items()
    )
    return Appended(positions, tuple(loose), tuple(run_id for run_id, ours in owned.items() if not ours))


def mark_lost(connection: Connection, report: node_service_pb2.RunReport) -> None:
    """Put a gap where the logs of these steps' last attempts should go on: their node has given them away."""
    for step in report.steps:
        lengths = {types_pb2.LOG_STREAM_STDOUT: step.stdout_bytes, types_pb2.LOG_STREAM_STDERR: step.stderr_bytes}
        for stream, length in lengths.items():
            key = (report.run_id, step.name, step.attempt, int(stream))
            end = end_of(connection, *key)
            if length > end:
                chunk = types_pb2.RunLogChunk(stream=stream, offset=end, gap_bytes=length - end)
                _append_one(connection, key, end, measure(chunk))


def end_of(connection: Connection, run_id: str, step: str, attempt: int, stream: int) -> int:
    """The offset of the next byte of a log."""
    row = _last(connection, (run_id, step, attempt, stream))
    return 0 if row is None else int(row.end)


def read(
    connection: Connection, run_id: str, *, after: int, step: str = "", attempt: int = 0, limit: int = 100
) -> tuple[list[types_pb2.RunLogChunk], int]:
    """The next chunks in the order in which they came, unpacked, and the number to go on after."""
    query = _of(run_id, step, attempt).where(_LOGS.id > after).order_by(_LOGS.id).limit(limit)
    chunks = []
    for row in connection.execute(query):
        chunks.append(_chunk(row))
        after = row.id
    return chunks, after


def tail(
    connection: Connection, run_id: str, lines: int, *, step: str = "", attempt: int = 0
) -> tuple[list[types_pb2.RunLogChunk], int]:
    """The last ``lines`` lines of each step's log, and the number to go on after."""
    last = connection.execute(
        select(_LOGS.id).where(_LOGS.run_id == run_id).order_by(_LOGS.id.desc()).limit(1)
    ).scalar()
    chunks: list[tuple[int, types_pb2.RunLogChunk]] = []
    streams = connection.execute(
        _of(run_id, step, attempt).with_only_columns(_LOGS.step, _LOGS.attempt, _LOGS.stream).distinct()
    ).all()
    for name, attempt_, stream in streams:
        wanted = lines
        query = _of(run_id, name, attempt_).where(_LOGS.stream == stream).order_by(_LOGS.id.desc())
        newest = True
        for row in connection.execute(query).yield_per(50):
            chunk = _chunk(row)
            chunk.data, wanted = _last_lines(chunk.data, wanted, at_end=newest)
            newest = newest and not chunk.data
            chunk.offset = row.end - len(chunk.data)
            if chunk.data or chunk.gap_bytes:
                chunks.append((row.id, chunk))
            if wanted < 0:
                break
    return [chunk for _, chunk in sorted(chunks, key=lambda item: item[0])], last or 0


def _last_lines(data: bytes, wanted: int, *, at_end: bool) -> tuple[bytes, int]:
    """The part of ``data`` within the last ``wanted`` line ends, and how many are still wanted; -1: enough."""
    place = len(data)
    if at_end and data.endswith(b"\n"):
        place -= 1  # it ends the last line rather than beginning another
    while True:
        place = data.rfind(b"\n", 0, place)
        if place < 0:
            return data, wanted
        wanted -= 1
        if wanted <= 0:
            return data[place + 1 :], -1


def _append_one(connection: Connection, key: _Key, end: int, piece: Piece) -> int:
    chunk, new_end = piece.chunk, piece.chunk.offset + piece.raw_bytes
    data, gap, zstd = chunk.data, chunk.gap_bytes, chunk.zstd
    if gap == -1:
        last = _last(connection, key)
        if chunk.offset < end or (last is not None and last.gap == -1 and last.end == chunk.offset):
            return end
        new_end, data, zstd = end, b"", False
    elif new_end <= end:
        return end
    elif gap > 0:
        gap, data, zstd = new_end - end, b"", False
    elif chunk.offset < end:
        raw = unpack(data) if zstd else data
        data, zstd = raw[end - chunk.offset :], False
    run_id, step, attempt, stream = key
    connection.execute(
        insert(schema.run_logs).values(
            run_id=run_id,
            step=step,
            attempt=attempt,
            stream=stream,
            offset=end,
            end=new_end,
            gap=gap,
            zstd=zstd,
            data=data,
            time=micros(chunk.time),
        )
    )
    return new_end


def _last(connection: Connection, key: _Key) -> _LogRow | None:
    run_id, step, attempt, stream = key
    return connection.execute(
        select(schema.run_logs)
        .where(_LOGS.run_id == run_id, _LOGS.step == step, _LOGS.attempt == attempt, _LOGS.stream == stream)
        .order_by(_LOGS.end.desc(), _LOGS.id.desc())
        .limit(1)
    ).first()


def _of(run_id: str, step: str, attempt: int) -> Select[tuple[Any, ...]]:
    query = select(schema.run_logs).where(_LOGS.run_id == run_id)
    if step:
        query = query.where(_LOGS.step == step)
    if attempt:
        query = query.where(_LOGS.attempt == attempt)
    return query


def _chunk(row: _LogRow) -> types_pb2.RunLogChunk:
    # Unpacked: the command line need not know zstd.
    return types_pb2.RunLogChunk(
        run_id=row.run_id,
        step=row.step,
        attempt=row.attempt,
        stream=row.stream,
        offset=row.offset,
        data=unpack(row.data) if row.zstd else row.data,
        gap_bytes=row.gap,
        time=stamp(row.time),
    )
