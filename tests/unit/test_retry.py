"""The retry policy's constants, measured: the spread of the waits, the cap, the count, the classes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import (
    EngineUnavailable,
    ErrorClass,
    InvalidInput,
    OperationTimeout,
    OutriderError,
    TemporaryError,
    Unavailable,
)
from outrider.retry import FOREVER, OperationCounts, RetryPolicy

DRAWS = 20_000


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def seeded(**settings: float) -> RetryPolicy:
    return RetryPolicy(rng=random.Random(20), **settings)  # type: ignore[arg-type]


def failing(error: OutriderError, times: int = 1_000_000) -> Callable[[], Awaitable[str]]:
    """An operation that fails ``times`` times, then succeeds."""
    left = [times]

    async def operation() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "done"

    return operation


@pytest.mark.parametrize("retry", range(1, 13))
def test_waits_double_and_are_spread_evenly_by_a_fifth_to_either_side(retry: int) -> None:
    policy = seeded()
    base = min(0.1 * 2 ** (retry - 1), 25.0)  # the cap, 30 s, with its jitter
    waits = [policy.wait_s(retry) for _ in range(DRAWS)]
    assert base * 0.8 <= min(waits) < base * 0.81
    assert base * 1.19 < max(waits) <= base * 1.2 <= 30.0
    # Evenly: each tenth of the range has a tenth of the waits (the standard deviation of a bin is 42).
    bins = [0] * 10
    for wait in waits:
        bins[min(9, int((wait / base - 0.8) / 0.04))] += 1
    assert all(abs(count - DRAWS / 10) < 6 * 42.5 for count in bins), bins


@given(retry=st.integers(1, 10_000), seed=st.integers())
def test_no_wait_is_over_thirty_seconds(retry: int, seed: int) -> None:
    assert 0.08 <= RetryPolicy(rng=random.Random(seed)).wait_s(retry) <= 30.0


def test_at_the_cap_a_fleet_still_does_not_move_in_step() -> None:
    waits = {seeded().wait_s(50)} | {RetryPolicy().wait_s(50) for _ in range(1000)}
    assert len(waits) > 990


async def test_the_sixth_failure_is_the_last() -> None:
    clock, policy = Clock(), seeded()
    tries = []

    async def operation() -> None:
        tries.append(clock.now)
        raise Unavailable("away")

    with pytest.raises(Unavailable):
        await policy.run(operation, sleep=clock.sleep)
    assert len(tries) == 6
    assert len(clock.waits) == 5
    for retry, wait in enumerate(clock.waits):
        assert 0.08 * 2**retry <= wait <= 0.12 * 2**retry
    assert 3.1 * 0.8 <= clock.now <= 3.1 * 1.2


async def test_reconnecting_goes_on_for_ever() -> None:
    clock = Clock()
    assert await FOREVER.run(failing(Unavailable("away"), 3000), sleep=clock.sleep) == "done"
    assert len(clock.waits) == 3000
    assert clock.now > 2900 * 20


@pytest.mark.parametrize(
    ("error", "idempotent", "tries"),
    [
        (TemporaryError("busy"), False, 6),
        (EngineUnavailable("restarting"), False, 6),
        (InvalidInput("wrong"), True, 1),
        (OutriderError("who knows"), True, 1),
        (OperationTimeout("late"), True, 6),
        (OperationTimeout("late"), False, 1),
    ],
)
async def test_what_is_tried_again_is_decided_by_the_class(error: OutriderError, idempotent: bool, tries: int) -> None:
    clock, made = Clock(), []

    async def operation() -> None:
        made.append(1)
        raise error

    with pytest.raises(type(error)):
        await RetryPolicy().run(operation, idempotent=idempotent, sleep=clock.sleep)
    assert len(made) == tries


async def test_a_step_sets_its_own_first_wait_and_count() -> None:
    clock = Clock()
    policy = seeded(first_wait_s=2.0, max_retries=2)
    assert await policy.run(failing(TemporaryError("busy"), 2), sleep=clock.sleep) == "done"
    assert 1.6 <= clock.waits[0] <= 2.4
    assert 3.2 <= clock.waits[1] <= 4.8


async def test_the_policy_keeps_its_times_by_the_real_clock() -> None:
    planned: list[float] = []
    gaps: list[float] = []
    last = [0.0]

    async def operation() -> str:
        now = time.monotonic()
        gaps.append(now - last[0])
        last[0] = now
        if len(gaps) < 6:
            raise Unavailable("away")
        return "done"

    started = time.monotonic()
    answer = await RetryPolicy().run(operation, on_retry=lambda _number, wait, _error: planned.append(wait))
    took = time.monotonic() - started
    assert answer == "done"
    assert len(planned) == 5
    # Never early, by the loop's own clock and its resolution; late only by what the machine is busy with.
    assert all(gap >= wait - 0.02 for gap, wait in zip(gaps[1:], planned, strict=True))
    assert 3.1 * 0.8 <= took < sum(planned) + 5 * 0.5


async def test_retries_and_failures_are_counted_by_operation_and_class() -> None:
    counts = OperationCounts()
    clock = Clock()
    quick = RetryPolicy(first_wait_s=0.0001)
    await counts.run("image.pull", quick, failing(Unavailable("away"), 2))
    with pytest.raises(Unavailable):
        await counts.run("image.pull", quick, failing(Unavailable("away")))
    with pytest.raises(OperationTimeout):
        await counts.run("container.stop", quick, failing(OperationTimeout("late")), idempotent=False)
    await quick.run(failing(TemporaryError("x"), 1), on_retry=counts.on_retry("step"), sleep=clock.sleep)
    assert [(each.operation, each.error_class, each.retries, each.failures) for each in counts.all()] == [
        ("container.stop", ErrorClass.TIMEOUT, 0, 1),
        ("image.pull", ErrorClass.TEMPORARY, 7, 1),
        ("step", ErrorClass.TEMPORARY, 1, 0),
    ]


async def test_a_cancelled_wait_ends_the_retrying() -> None:
    task = asyncio.ensure_future(RetryPolicy(first_wait_s=60).run(failing(Unavailable("away"))))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
