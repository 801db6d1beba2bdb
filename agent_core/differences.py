"""Reports that wait are differences of the same states: of one run they become one, which says what is true now."""

from __future__ import annotations

from agent_core.outbox import Item
from outrider.v1 import node_service_pb2 as pb


class Differences:
    """Run reports in the order of the outbox, merged by run and lease."""

    def __init__(self) -> None:
        self._reports: dict[tuple[str, str], tuple[pb.RunReport, list[int]]] = {}

    def add(self, item: Item) -> None:
        """``item`` is a run report, later than all that were added."""
        report = pb.RunReport.FromString(item.body)
        report.sequence = item.sequence
        key = (report.run_id, report.lease_id)
        former, sequences = self._reports.get(key, (None, []))
        if former is not None:
            _fill_up(report, former)
        self._reports[key] = (report, [*sequences, item.sequence])

    def take(self) -> list[tuple[pb.RunReport, list[int]]]:
        """What is to be sent, each with the outbox numbers that it stands for; its own number is the last of them."""
        taken = list(self._reports.values())
        self._reports.clear()
        return taken


def _fill_up(report: pb.RunReport, former: pb.RunReport) -> None:
    """Add to ``report`` what an earlier one said and it does not say again."""
    said = {status.name for status in report.steps}
    steps = [*(status for status in former.steps if status.name not in said), *report.steps]
    for field in ("failure", "started_at", "finished_at"):
        if former.HasField(field) and not report.HasField(field):
            getattr(report, field).CopyFrom(getattr(former, field))
    report.state = report.state or former.state
    del report.steps[:]
    report.steps.extend(steps)
