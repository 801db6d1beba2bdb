"""Trying again: how often, and after which wait."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from http_transfer.failures import MAX_WAIT_S, HttpFailure

T = TypeVar("T")

MAX_RETRIES = 5
_FIRST_WAIT_S = 0.1


def persist(attempt: Callable[[], T], position: Callable[[], int], again: Callable[[HttpFailure], bool]) -> T:
    """Call ``attempt()`` until it returns, with backoff, as long as ``again`` says so about what it raised.

    Gives up after five retries in a row in which ``position()`` reached nothing new, so that a long transfer
    over a bad link may be cut any number of times as long as it gets on.
    """
    retry, reached = 0, position()
    while True:
        try:
            return attempt()
        except HttpFailure as error:
            if position() > reached:
                retry, reached = 0, position()
            if not error.temporary or not again(error) or retry == MAX_RETRIES:
                raise
            retry += 1
            time.sleep(max(error.wait_s, wait_s(retry)))


def wait_s(retry: int) -> float:
    """The wait before retry number ``retry`` (from 1): doubling from 100 ms, jitter 20 %, at most 30 s."""
    wait = min(_FIRST_WAIT_S * 2.0 ** (retry - 1), MAX_WAIT_S)
    return min(wait * random.uniform(0.8, 1.2), MAX_WAIT_S)  # noqa: S311  # spreads load, guards nothing
