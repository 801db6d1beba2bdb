"""The model finds what is wrong: with a promise broken on purpose, a short history is enough to be told so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from agent_core.orders import AttemptOrder
from agent_core.outbox import Outbox
from agent_core.spool import Spool
from agent_core.state import State
from server_core.store import turns
from tests.model.driver import Driver, Step
from tests.model.judge import judge, settle
from tests.model.world import World

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Patch = Callable[[pytest.MonkeyPatch], object]

KILLED: list[Step] = [("submit", ["two", "a"]), ("kill_agent", []), ("start_agent", []), ("finish", [0, 0])]


def _forgets_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "unfinished", lambda _self: ([], []))


def _names_containers_anew(patch: pytest.MonkeyPatch) -> None:
    """Each agent gives an attempt's container another name, and forgets that it was made."""
    agents = itertools.count()
    number = [0]
    init = State.__init__
    name = AttemptOrder.container.fget  # type: ignore[attr-defined]

    def begin(self: State, *args: Any, **options: Any) -> None:
        number[0] = next(agents)
        init(self, *args, **options)

    patch.setattr(State, "__init__", begin)
    patch.setattr(AttemptOrder, "container", property(lambda self: f"{name(self)}-{number[0]}"))
    patch.setattr(State, "attempt_phase", lambda *_: lambda _db: None)


def _drops_output(patch: pytest.MonkeyPatch) -> None:
    append = Spool.append
    patch.setattr(Spool, "append", lambda self, log, data: append(self, log, data.replace(b"x", b"")))


def _lets_all_runs_at_an_object(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(turns, "blocker_of", lambda *_: None)


def _acknowledges_what_it_drops(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outbox, "read", lambda _self, *_args, **_options: [])


@pytest.mark.parametrize(
    ("breaks", "history", "told"),
    [
        (_forgets_runs, KILLED, "lost"),
        (_names_containers_anew, KILLED, "more than once"),
        (_drops_output, [("submit", ["one", ""]), ("write", [0, "x"])], "the log of"),
        (_lets_all_runs_at_an_object, [("submit", ["one", "a"]), ("submit", ["two", "a"])], "two runs of one object"),
        (_acknowledges_what_it_drops, [("submit", ["one", ""])], "lost"),
    ],
)
def test_a_promise_that_is_broken_on_purpose_is_found(
    monkeypatch: pytest.MonkeyPatch, breaks: Patch, history: list[Any], told: str
) -> None:
    breaks(monkeypatch)
    with pytest.raises(AssertionError, match=told):
        _judged(history)


def test_the_same_histories_are_fine_where_nothing_is_broken() -> None:
    _judged([*KILLED, ("submit", ["one", ""]), ("write", [0, "x"]), ("submit", ["one", "a"])])


def _judged(history: list[Any]) -> None:
    with World() as world:
        Driver(world).replay(history)
        settle(world)
        judge(world)
