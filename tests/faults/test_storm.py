"""A whole fleet that loses its server at once comes back by turns: simulated agents, real sessions over TLS."""

from __future__ import annotations

import asyncio
import signal

import pytest

from benchmarks._fleet import Return, cut_off, fleet_of, server_process

STOPPED = pytest.param(signal.SIGTERM, id="stopped", marks=pytest.mark.long)
KILLED = pytest.param(signal.SIGKILL, id="killed")


async def measured(count: int, rate: float, how: signal.Signals) -> Return:
    with server_process(registrations_per_second=rate, heartbeat_interval_s=1) as server:
        async with fleet_of(server, count) as fleet:
            await asyncio.sleep(2)  # everybody has had a heartbeat answered, and with it the policy of the whole fleet
            result = await cut_off(fleet, how, away_s=1.0)
            print(result.sentence())
            return result


def no_storm(result: Return, rate: float) -> None:
    """``rate`` a second are let in, and a second's worth that was saved up; nobody is refused again and again."""
    assert 0 < result.peak_let_in <= 2.5 * rate  # by the time at which the transaction was through: they bunch a little
    assert result.asked <= 2 * result.agents
    assert result.refused <= result.agents
    assert result.all_s >= (result.agents - 2 * rate) / rate


@pytest.mark.parametrize("how", [STOPPED, KILLED])
async def test_a_fleet_that_was_cut_off_at_once_comes_back_by_turns(how: signal.Signals) -> None:
    result = await measured(60, 15.0, how)
    no_storm(result, 15.0)
    assert result.peak_asked <= 45  # of 60, where the backoff alone has them come almost all together


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", [STOPPED, KILLED])
async def test_five_hundred_agents_that_were_cut_off_at_once_make_no_storm(how: signal.Signals) -> None:
    result = await measured(500, 100.0, how)
    no_storm(result, 100.0)
    assert result.peak_asked <= 300  # where the backoff alone has 355 to 389 of them come on a machine that is idle
