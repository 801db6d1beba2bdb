"""The audit log, for reading. What is written to it belongs to the transactions of the other parts."""

from __future__ import annotations

from outrider.v1 import control_service_pb2 as pb
from server_core.control.common import Context, Part
from server_core.store import audit

_MAX_LISTED = 1000


class Audit(Part):
    async def ListAudit(self, request: pb.ListAuditRequest, context: Context) -> pb.ListAuditResponse:
        limit = min(request.limit, _MAX_LISTED) if request.limit > 0 else 100
        found = await self._s.db.read(
            lambda c: audit.listed(
                c,
                subject=request.subject,
                actor=request.actor,
                verb=request.verb,
                before=request.before,
                limit=limit,
            )
        )
        return pb.ListAuditResponse(entries=found)

    async def VerifyAudit(self, request: pb.VerifyAuditRequest, context: Context) -> pb.VerifyAuditResponse:
        """Read the whole log and recompute its chain."""
        verdict = await self._s.db.read(audit.verify)
        return pb.VerifyAuditResponse(
            rows=verdict.rows, first_bad=verdict.first_bad, problem=verdict.problem, head=verdict.head
        )
