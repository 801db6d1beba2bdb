"""How a followed run is shown: a line for each change, or a picture that is drawn again on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from outrider.cli._output import clean, duration, note, seconds_between, size, word
from outrider.cli._watch import TERMINAL, View
from outrider.v1 import types_pb2 as types

PROGRESS_EVERY_S = 5.0

_PENDING = (types.STEP_STATE_PENDING, types.STEP_STATE_UNSPECIFIED)


def open_view(run: types.Run) -> AbstractContextManager[View]:
    """The view that fits stderr: lively on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        return LiveView(run)
    return nullcontext(Lines())


def step_sentence(step: types.StepStatus) -> str:
    """What is to be said about a step in one line: its progress, what it waits for, why it failed."""
    if step.failure.message:
        return clean(step.failure.message)
    if step.HasField("settlement"):
        return clean(f"settled by {step.settlement.by}: {step.settlement.reason}")
    if step.from_run:
        return clean(f"taken over from run {step.from_run}")
    if step.reason:
        return clean(step.reason)
    if step.state == types.STEP_STATE_RUNNING:
        return progress_text(step.progress)
    return ""


def progress_text(progress: types.Progress) -> str:
    """``45 % of 12.0 MiB``, ``3 of 7 files``, ``12.0 MiB``, and what the step says."""
    show: Callable[[int], str] = size if progress.unit == "bytes" else str
    unit = "" if progress.unit == "bytes" or not progress.unit else f" {clean(progress.unit)}"
    parts = []
    if progress.total and progress.unit == "bytes":
        parts.append(f"{min(100, 100 * progress.done // progress.total)} % of {show(progress.total)}")
    elif progress.total:
        parts.append(f"{progress.done} of {progress.total}{unit}")
    elif progress.done:
        parts.append(f"{show(progress.done)}{unit}")
    if progress.message:
        parts.append(clean(progress.message))
    return ", ".join(parts)


def took(item: types.StepStatus | types.Run) -> str:
    """How long a step or run took, by the clock of its node; "" while it is under way."""
    return duration(seconds_between(item.started_at, item.finished_at))


class Lines:
    """A line on stderr for every change of a step, and now and then one for its progress."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._said: dict[str, float] = {}
        self._state = 0

    def show(self, run: types.Run) -> None:
        # What has ended is told after its parts, what begins before them.
        if run.state in TERMINAL:
            for step in run.steps:
                self._step(step)
        if run.state != self._state:
            self._state = run.state
            what = f"run {run.run_id} of {run.pipeline} on {run.node_id}: {word(types.RunState, run.state)}"
            note(f"{what}{f': {run.reason}' if run.reason else ''}{f' in {took(run)}' if took(run) else ''}")
        for step in run.steps:
            self._step(step)

    def _step(self, step: types.StepStatus) -> None:
        seen = (step.state, step.attempt, step.reason)
        now = time.monotonic()
        if self._seen.get(step.name) != seen:
            self._seen[step.name] = seen
            if step.state in _PENDING:
                return
            attempt = f" (attempt {step.attempt})" if step.attempt > 1 else ""
            time_taken = f" in {took(step)}" if took(step) else ""
            text = step_sentence(step)
            note(f"{step.name}: {word(types.StepState, step.state)}{attempt}{time_taken}{f': {text}' if text else ''}")
            self._said[step.name] = now
        elif step.state == types.STEP_STATE_RUNNING and now - self._said.get(step.name, now) >= PROGRESS_EVERY_S:
            if text := progress_text(step.progress):
                note(f"{step.name}: {text}")
            self._said[step.name] = now

    def tick(self) -> None:
        """Lines are only written when something changes."""

    def say(self, text: str) -> None:
        note(text)


_MARKS = {
    types.STEP_STATE_SUCCEEDED: ("✔", "green"),
    types.STEP_STATE_FAILED: ("✘", "red"),
    types.STEP_STATE_SKIPPED: ("↷", "dim"),
    types.STEP_STATE_CANCELLED: ("■", "yellow"),
    types.STEP_STATE_UNKNOWN: ("?", "yellow"),
    types.STEP_STATE_WAITING: ("◌", "yellow"),
}


class LiveView(AbstractContextManager["LiveView"]):
    """A line for each step, drawn again as it changes; progress as bars."""

    def __init__(self, run: types.Run) -> None:
        from rich.console import Console
        from rich.live import Live

        self._run = run
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._started: dict[tuple[str, int], float] = {}
        self._notes: list[str] = []

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._draw()
        self._live.stop()

    def show(self, run: types.Run) -> None:
        self._run = run
        for step in run.steps:
            if step.state == types.STEP_STATE_RUNNING:
                # Measured here: the clock of the node may be off.
                self._started.setdefault((step.name, step.attempt), time.monotonic())
        self._draw()

    def tick(self) -> None:
        self._draw()

    def say(self, text: str) -> None:
        self._console.print(clean(text))

    def _draw(self) -> None:
        self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        run = self._run
        state = word(types.RunState, run.state)
        title = Text(f"{clean(run.pipeline)} on {clean(run.node_id)}", style="bold")
        title.append(f"  {run.run_id}  {state} {took(run)}", style="dim")
        if run.reason:
            title.append(f"  {clean(run.reason)}", style="yellow")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        steps, hidden = self._visible()
        for step in steps:
            grid.add_row(*self._cells(step))
        return Group(title, grid, Text(f"  … {hidden} more steps", style="dim")) if hidden else Group(title, grid)

    def _visible(self) -> tuple[list[types.StepStatus], int]:
        """As many steps as the terminal has lines for, with those that are under way among them."""
        steps = list(self._run.steps)
        room = max(3, self._console.size.height - 4)
        if len(steps) <= room:
            return steps, 0
        active = next((i for i, step in enumerate(steps) if step.state in (*_PENDING, types.STEP_STATE_RUNNING)), 0)
        first = max(0, min(active - room // 3, len(steps) - room))
        return steps[first : first + room], len(steps) - room

    def _cells(self, step: types.StepStatus) -> tuple[Any, ...]:
        from rich.spinner import Spinner
        from rich.text import Text

        sign, style = _MARKS.get(step.state, ("·", "dim"))
        mark: Any = Spinner("dots", style="cyan") if step.state == types.STEP_STATE_RUNNING else Text(sign, style=style)
        time_taken = took(step)
        if step.state == types.STEP_STATE_RUNNING:
            time_taken = duration(time.monotonic() - self._started[step.name, step.attempt])
        attempt = f" #{step.attempt}" if step.attempt > 1 else ""
        return mark, Text(clean(step.name) + attempt), Text(clean(step.uses)), Text(time_taken), self._rest(step)

    @staticmethod
    def _rest(step: types.StepStatus) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text = step_sentence(step)
        if step.state != types.STEP_STATE_RUNNING or not step.progress.total or step.reason:
            return Text(text, style=_MARKS.get(step.state, ("", ""))[1])
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=step.progress.total, completed=step.progress.done, width=24), Text(text))
        return row
