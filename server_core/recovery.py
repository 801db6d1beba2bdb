"""What an agent that has lost its journal is told: every run that it was ever sent and that is not over.

The server has what was sent and what was told of it; what the node's containers say is the agent's to look up. Only
of what neither of them knows is the outcome unknown.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from outrider.v1 import node_service_pb2 as pb
from server_core.store import runs
from server_core.store.runs import RunRow


def recover(connection: Connection, node_id: str, seen: Iterable[pb.RunRef]) -> pb.RecoverRunsResponse:
    """The runs of ``node_id`` to go on with. ``seen``: those of which there are containers on the node."""
    answer = pb.RecoverRunsResponse()
    # One that is queued and was sent may have reached the node, whose acknowledgement was lost on the way.
    rows = {row.run_id: row for row in runs.active_on(connection, node_id) if row.sent or row.state != runs.QUEUED}
    for ref in seen:
        row = runs.row_of(connection, ref.run_id)
        if row is None or row.node_id != node_id:
            continue  # not known here: nobody's work is killed for that
        if row.lease_id != ref.lease_id or row.state in runs.SETTLED:
            answer.over.append(ref.run_id)
        elif row.state == runs.UNKNOWN:
            rows[row.run_id] = row  # it may turn out what became of it
    for row in rows.values():
        answer.runs.append(_recovered(connection, row))
    return answer


def _recovered(connection: Connection, row: RunRow) -> pb.RecoverRunsResponse.Recovered:
    recovered = pb.RecoverRunsResponse.Recovered(
        command=runs.pipeline_command(row), steps=runs.get(connection, row.run_id).steps
    )
    if row.cancel_requested:
        recovered.cancel.CopyFrom(runs.cancel_command(row))
    return recovered
