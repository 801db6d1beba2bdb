"""The pipelines that the model runs: each a shape that a promise is about."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline and what the judge needs to know of it."""

    name: str
    text: str
    steps: tuple[str, ...]
    needs: dict[str, tuple[str, ...]]
    cleanup: frozenset[str] = frozenset()
    idempotent: frozenset[str] = frozenset()
    retries: int = 0
    timeout_s: float | None = None
    writes: str = ""  # the attribute that it writes back, its value the run's id
    secret: bool = False  # it is given one, which has to be masked


def _pipeline(name: str, *steps: dict[str, Any], **more: Any) -> str:
    items = [{"uses": "test.shell", "with": {"script": step["name"]}, **step} for step in steps]
    return json.dumps({"name": name, "steps": items, **more})


_RETRY = {"max": 2, "first_wait": "1s"}

ONE = Pipeline("one", _pipeline("one", {"name": "a"}), ("a",), {"a": ()})
TWO = Pipeline(
    "two",
    _pipeline(
        "two",
        {"name": "a"},
        {"name": "b", "with": {"script": "b"}},
        writeback=[{"attribute": "last", "value": "${{ run.id }}"}],
    ),
    ("a", "b"),
    {"a": (), "b": ("a",)},
    writes="last",
)
FORK = Pipeline(
    "fork",
    _pipeline(
        "fork",
        {"name": "a", "needs": []},
        {"name": "b", "needs": []},
        {"name": "c", "needs": ["a", "b"]},
        {"name": "z", "needs": ["c"], "if": "always()"},
        volumes={"v": {}},
    ),
    ("a", "b", "c", "z"),
    {"a": (), "b": (), "c": ("a", "b"), "z": ("c",)},
    cleanup=frozenset({"z"}),
)
TRIED = Pipeline(
    "tried",
    _pipeline("tried", {"name": "a", "retry": _RETRY, "volumes": {"v": "/v:rw"}}, {"name": "b"}, volumes={"v": {}}),
    ("a", "b"),
    {"a": (), "b": ("a",)},
    retries=2,
)
AGAIN = Pipeline(
    "again",
    _pipeline("again", {"name": "a", "uses": "test.again", "retry": _RETRY}, {"name": "b"}),
    ("a", "b"),
    {"a": (), "b": ("a",)},
    idempotent=frozenset({"a"}),
    retries=2,
)
TIMED = Pipeline(
    "timed",
    _pipeline("timed", {"name": "a", "timeout": "60s"}, {"name": "b", "if": "always()"}),
    ("a", "b"),
    {"a": (), "b": ("a",)},
    cleanup=frozenset({"b"}),
    timeout_s=60,
)
SECRET = Pipeline(
    "secret",
    _pipeline("secret", {"name": "a", "envs": {"KEY": "store.KEY"}}, {"name": "b"}, envs=[{"set": "store"}]),
    ("a", "b"),
    {"a": (), "b": ("a",)},
    secret=True,
)
ALL = (ONE, TWO, FORK, TRIED, AGAIN, TIMED, SECRET)
BY_NAME = {each.name: each for each in ALL}
