"""What both sides compute alike of the runs that a node holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from outrider.v1 import types_pb2 as types

TERMINAL = frozenset(
    {
        types.RUN_STATE_SUCCEEDED,
        types.RUN_STATE_FAILED,
        types.RUN_STATE_CANCELLED,
        types.RUN_STATE_UNKNOWN,
    }
)


def held_digest(runs: Iterable[types.HeldRun]) -> bytes:
    """SHA-256 over the runs that are not terminal, by id: run id, lease id and state.

    The agent puts it into each heartbeat; a server that believes something else asks for a full report.
    """
    digest = hashlib.sha256()
    for run in sorted(runs, key=lambda each: each.run_id):
        if run.state not in TERMINAL:
            digest.update(f"{run.run_id}\0{run.lease_id}\0{run.state}\n".encode())
    return digest.digest()
