"""What single checks of the kit look for, case by case; whole bad plugins are in test_kit.py."""

from __future__ import annotations

import concurrent.futures
import enum
import multiprocessing
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, JsonValue, RootModel, SecretStr, StringConstraints, create_model

from outrider.steps import ReadPath
from outrider.testing._purity import watched
from outrider.testing._schemas import open_objects, secrets


def in_a_pool() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()


def in_a_thread() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def in_a_process() -> None:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (in_a_thread, "starts a thread"),
        (in_a_pool, "starts a thread"),
        (lambda: time.clock_gettime(time.CLOCK_MONOTONIC), "reads the clock"),
        (lambda: time.clock_gettime_ns(time.CLOCK_REALTIME), "reads the clock"),
        (time.thread_time, "reads the clock"),
        (time.thread_time_ns, "reads the clock"),
        (time.process_time_ns, "reads the clock"),
        (time.time, "reads the clock"),
        (uuid.uuid4, "uses randomness"),
        (lambda: os.environ.get("HOME"), "environment"),
        (lambda: Path("/etc/hostname").exists(), "asks the system"),
    ],
)
def test_what_is_not_pure_is_seen(act: Callable[[], Any], says: str) -> None:
    with watched() as found:
        act()
    assert any(says in each for each in found), found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside other threads, in newer Pythons
def test_a_process_is_seen() -> None:
    with watched() as found:
        in_a_process()
    assert any("starts a process" in each for each in found), found


def test_what_is_pure_is_let_pass() -> None:
    with watched() as found:
        random.Random(4).random()
        time.mktime((2020, 2, 29, 0, 0, 0, 0, 0, 0))
        Path("/a", "../b").as_posix()
    assert found == []


class Login(BaseModel):
    user: str
    password: str


class Tree(BaseModel):
    branches: list[Tree] = []
    twigs: dict[str, Tree] = {}
    token: str


class Kind(enum.Enum):
    none = "none"
    bearer = "bearer"


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("password", str, ["it"]),
        ("password", str | None, ["it"]),
        ("password", Any, ["it"]),
        ("password", Annotated[str, StringConstraints(min_length=1)] | None, ["it"]),
        ("pw", Annotated[str, Field(max_length=9)] | None, ["it"]),
        ("db_pwd", str, ["it"]),
        ("bearer", str, ["it"]),
        ("passwords", list[str], ["it"]),
        ("tokens", dict[str, str], ["it"]),
        ("access_keys", dict[str, list[str]], ["it"]),
        ("secret", list, ["it"]),
        ("credentials", JsonValue, ["it"]),
        ("token", int | Annotated[str, Field(pattern="x")], ["it"]),
        ("anything", SecretStr, ["it"]),
        ("anything", list[SecretStr] | None, ["it"]),
        ("auth", Login, ["it.password"]),
        ("auth", list[Login], ["it[].password"]),
        ("auth", dict[str, Login | None], ["it.*.password"]),
        ("tree", Tree, ["it.token"]),
        ("password_env", str, []),
        ("token_from", str | None, []),
        ("secret_names", list[str], []),
        ("token", Literal["none", "bearer"], []),
        ("bearer", Kind | None, []),
        ("max_tokens", int, []),
        ("secret", bool, []),
        ("private_key", ReadPath, []),
        ("pwned", str, []),
        ("headers", dict[str, str], []),
    ],
)
def test_secrets_are_seen_wherever_they_stand(name: str, kind: Any, found: list[str]) -> None:
    schema = create_model("Params", **{name: (kind, ...)}).model_json_schema()
    assert list(secrets(schema)) == [each.replace("it", name, 1) for each in found]


class Open(BaseModel):
    a: int


class Empty(BaseModel):
    pass


class Allowing(BaseModel, extra="allow"):
    a: int


class Closed(BaseModel, extra="forbid"):
    a: int
    names: dict[str, str] = {}
    whatever: dict[str, Any] = {}
    ports: dict[Annotated[str, StringConstraints(pattern="^[a-z]+$")], int] = {}
    rest: JsonValue = None


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Open, [("outputs.it", "Open")]),
        (Empty, [("outputs.it", "Empty")]),
        (Allowing | None, [("outputs.it", "Allowing")]),
        (list[Open], [("outputs.it[]", "Open")]),
        (dict[str, Open], [("outputs.it.*", "Open")]),
        (Closed, []),
        (list[Closed | None], []),
        (RootModel[dict[str, int]], []),
    ],
)
def test_open_models_are_seen_wherever_they_stand(kind: Any, found: list[tuple[str, str]]) -> None:
    model = create_model("Outputs", __config__={"extra": "forbid"}, it=(kind, ...))
    assert list(open_objects(model.model_json_schema(mode="serialization"), "outputs")) == found
