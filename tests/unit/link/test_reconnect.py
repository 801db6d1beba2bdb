"""When an agent looks for its server again: measured on the policy itself, with the random source injected."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from agent_core.reconnect import SUPERSEDED, Reconnect
from outrider.awake import AwakeClock
from outrider.errors import Conflict, OutriderError, TemporaryError, Unavailable
from outrider.retry import MAX_HINT_S, RetryPolicy
from server_core.admission import Admission

AWAY = Unavailable("away")
THROWN_OUT = Conflict("a newer session", code=SUPERSEDED)


def reconnect(seed: int = 1) -> Reconnect:
    rng = random.Random(seed)
    return Reconnect(RetryPolicy(max_retries=None, rng=rng), rng)


def test_waits_double_from_100_ms_to_the_cap_and_go_on_for_ever() -> None:
    link = reconnect()
    waits = [link.wait_s(AWAY) for _ in range(200)]
    for number, wait_s in enumerate(waits[:8]):
        assert 0.8 * 0.1 * 2**number <= wait_s <= 1.2 * 0.1 * 2**number
    assert max(waits) <= 30.0
    assert min(waits[10:]) >= 20.0 - 1e-9


def test_an_answered_heartbeat_makes_the_next_loss_a_new_one() -> None:
    link = reconnect()
    for _ in range(8):
        link.wait_s(AWAY)
    link.began()
    assert link.wait_s(AWAY) > 5  # it was open, and nothing came of it
    link.began()
    link.worked()
    assert link.wait_s(AWAY) < 0.13


def test_a_server_that_says_how_long_is_obeyed_and_never_comes_sooner() -> None:
    waits = [reconnect(seed).wait_s(Unavailable("stops", retry_after_s=7.0)) for seed in range(300)]
    assert min(waits) >= 7.0
    assert max(waits) <= 7.0 * 1.2
    assert reconnect().wait_s(Unavailable("stops", retry_after_s=1e9)) <= MAX_HINT_S * 1.2


def test_agents_of_a_dead_server_come_back_over_the_spread_that_they_were_told() -> None:
    second = []
    for seed in range(500):
        link = reconnect(seed)
        link.told_spread(5.0)
        assert link.wait_s(AWAY) <= 0.12  # perhaps it was only this link: look at once
        second.append(link.wait_s(AWAY))
    quarters = statistics.quantiles(second, n=4)
    assert quarters == pytest.approx([0.2 + 1.25, 0.2 + 2.5, 0.2 + 3.75], abs=0.4)


def test_two_agents_with_one_credential_back_off_from_each_other() -> None:
    link = reconnect()
    waits = []
    for _ in range(10):
        link.began()
        link.worked()  # each lasts just long enough for a heartbeat
        waits.append(link.wait_s(THROWN_OUT))
    assert waits[-1] > 15
    for _ in range(3):
        link.worked()
    assert link.wait_s(THROWN_OUT) < 0.13


@pytest.mark.parametrize(
    "error", [AWAY, THROWN_OUT, OutriderError("unforeseen"), TemporaryError("no", retry_after_s=0)]
)
def test_no_wait_is_ever_nothing(error: OutriderError) -> None:
    link = reconnect()
    assert all(link.wait_s(error) >= 0.08 for _ in range(100))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_time_asleep_does_not_count() -> None:
    clock = Clock()
    awake = AwakeClock(2.0, clock)
    for _ in range(5):
        clock.now += 1
        awake.now()
    clock.now += 3600
    assert awake.now() == pytest.approx(7.0)
    assert awake.take_pause() == pytest.approx(3598.0)
    assert awake.take_pause() == 0
    clock.now += 1.5
    assert awake.now() == pytest.approx(8.5)


def test_a_fleet_that_comes_at_once_is_let_in_at_an_even_rate_and_nobody_is_refused_twice() -> None:
    clock = Clock()
    clock.now += 60
    turns = Admission(50, clock=clock)
    clock.now += 10
    waits = {f"n{number}": turns.wait_s(f"n{number}") for number in range(500)}
    at_once = [name for name, wait_s in waits.items() if wait_s == 0]
    assert len(at_once) == 51  # a second's worth was saved up
    later = sorted(wait_s for wait_s in waits.values() if wait_s)
    assert later[-1] == pytest.approx((500 - 51) / 50)
    steps = [b - a for a, b in itertools.pairwise(later)]
    assert steps == pytest.approx([1 / 50] * len(steps))
    start = clock.now
    for name, wait_s in sorted(waits.items(), key=lambda item: item[1]):
        clock.now = start + wait_s + 0.001
        if wait_s:
            assert turns.wait_s(name) == 0


def test_who_comes_before_its_turn_keeps_it() -> None:
    clock = Clock()
    turns = Admission(1, saved_s=1.0, clock=clock)
    assert turns.wait_s("a") == 0
    assert turns.wait_s("b") == 0
    assert turns.wait_s("c") == pytest.approx(1)
    clock.now += 0.5
    assert turns.wait_s("c") == pytest.approx(0.5)
    assert turns.wait_s("d") == pytest.approx(1.5)
    clock.now += 0.5
    assert turns.wait_s("c") == 0


def test_turns_that_nobody_came_for_are_forgotten() -> None:
    clock = Clock()
    turns = Admission(10, clock=clock)
    for number in range(1000):
        turns.wait_s(f"n{number}")
    clock.now += 1000
    assert turns.wait_s("n999") == 0
    assert not turns._turns
