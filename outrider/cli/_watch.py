"""Following a run to its end: states from a thread that reconnects, key presses from the terminal."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from outrider.errors import ErrorClass, OutriderError, Unavailable
from outrider.retry import RetryPolicy
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as types

if TYPE_CHECKING:
    from outrider.cli._client import Client

TERMINAL = frozenset(
    {types.RUN_STATE_SUCCEEDED, types.RUN_STATE_FAILED, types.RUN_STATE_CANCELLED, types.RUN_STATE_UNKNOWN}
)
GIVE_UP_AFTER_S = 120.0
"""How long a server may be away before following ends. The run goes on all the same."""


class View(Protocol):
    """What shows a run while it is followed."""

    def show(self, run: types.Run) -> None:
        """The run has changed."""

    def tick(self) -> None:
        """Some time has passed."""

    def say(self, text: str) -> None:
        """A sentence to the person who looks on."""


class Left(Exception):
    """The person no longer wants to look on."""


def follow(client: Client, run: types.Run, view: View) -> types.Run:
    """Show ``run`` until it is terminal; gives its last state.

    The first Ctrl-C says how to cancel, the second cancels, the third leaves the run to itself (raises Left).
    Raises Unavailable if the server stays away.
    """
    view.show(run)
    if run.state in TERMINAL:
        return run
    states: queue.SimpleQueue[types.Run | str | OutriderError] = queue.SimpleQueue()
    threading.Thread(target=_watch, args=(client, run.run_id, states), daemon=True, name="watch-run").start()
    handled = 0
    with _presses() as presses:
        while True:
            try:
                item = states.get(timeout=0.1)
            except queue.Empty:
                view.tick()
            else:
                if isinstance(item, OutriderError):
                    raise item
                if isinstance(item, str):
                    view.say(item)
                else:
                    view.show(item)
                    if item.state in TERMINAL:
                        return item
            if len(presses) > handled:
                handled += 1
                _pressed(client, run.run_id, view, handled)


def _pressed(client: Client, run_id: str, view: View, times: int) -> None:
    if times == 1:
        view.say(f"the run goes on; press Ctrl-C again to cancel it, or later: outrider runs cancel {run_id}")
    elif times == 2:
        from outrider.cli._client import request_id

        view.say("cancelling")
        client.call(
            client.stub.CancelRun,
            pb.CancelRunRequest(request_id=request_id(), run_id=run_id, reason="Ctrl-C in `outrider run`"),
        )
    else:
        raise Left


def _watch(client: Client, run_id: str, states: queue.SimpleQueue[types.Run | str | OutriderError]) -> None:
    """Put every state of the run into the queue until it is terminal; reconnect when the stream breaks."""
    waits = RetryPolicy(max_retries=None).waits()
    lost_at: float | None = None
    while True:
        try:
            for run in client.stream(client.stub.WatchRun, pb.WatchRunRequest(run_id=run_id)):
                if lost_at is not None:
                    states.put("the server is back")
                    lost_at, waits = None, RetryPolicy(max_retries=None).waits()
                states.put(run)
                if run.state in TERMINAL:
                    return
        except OutriderError as error:
            if error.error_class is not ErrorClass.TEMPORARY:
                states.put(error)
                return
            if lost_at is None:
                lost_at = time.monotonic()
                states.put(f"{error.message}; the run goes on, trying to look again")
        else:
            # The server ended the stream of a run that is not terminal: it is shutting down.
            lost_at = lost_at or time.monotonic()
        if lost_at is not None and time.monotonic() - lost_at > GIVE_UP_AFTER_S:
            states.put(
                Unavailable(
                    f"the server has been away for {GIVE_UP_AFTER_S:g} s; the run goes on",
                    hint=f"look later with: outrider runs show {run_id}",
                )
            )
            return
        time.sleep(next(waits))


@contextmanager
def _presses() -> Iterator[list[int]]:
    """A list that grows with every Ctrl-C, instead of the exception."""
    presses: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: presses.append(number))
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
