"""A transfer that is slow by wish keeps all of its connections moving."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .conftest import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "program"))

from s3_transfer.download import download
from s3_transfer.pace import Pace
from s3_transfer.upload import upload

MIB = 1024**2
_LONGEST_SILENCE_S = 2.0


@given(connections=st.integers(1, 64), limit=st.integers(65_536, 2 * 1024**3))
def test_no_connection_is_silent_for_long(connections: int, limit: int) -> None:
    pace = Pace.read({"connections": connections, "limit_bytes_per_s": limit})
    assert 1 <= pace.connections <= connections
    # Each has to wait until all of the others have had their piece.
    assert pace.connections * pace.piece_bytes(MIB) / limit <= _LONGEST_SILENCE_S
    assert 16 * 1024 <= pace.piece_bytes(MIB) <= MIB


def test_without_a_limit_pieces_are_large() -> None:
    assert Pace.read({"connections": 8}).piece_bytes(MIB) == MIB


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by intention, see files.File
@pytest.mark.parametrize("direction", ["up", "down"])
def test_pieces_are_small_under_a_limit(store: Store, tmp_path: Path, direction: str) -> None:
    body, file = bytes(MIB), tmp_path / "f"
    seen: list[int] = [0]
    params: dict[str, Any] = {"bucket": store.bucket, "key": "k", "limit_bytes_per_s": 2 * MIB, "connections": 8}
    if direction == "up":
        file.write_bytes(body)
        upload(params | {"from": str(file)}, store.env, lambda done, total, rate: seen.append(done))
    else:
        store.put("k", body)
        download(params | {"to": str(file)}, store.env, lambda done, total, rate: seen.append(done))
    assert seen[-1] == MIB
    assert max(after - before for before, after in pairwise(seen)) <= 64 * 1024
