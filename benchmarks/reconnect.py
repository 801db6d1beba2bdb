"""500 simulated agents that lose their server at once: how evenly they come back, with and without its hints."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import structlog
import uvloop

from benchmarks._fleet import Return, cut_off, fleet_of, server_process
from benchmarks._rig import Result

AGENTS = 500
AWAY_S = 0.5
NO_HINTS = 10_000.0
"""A rate of returns so great that nobody is given a turn and nothing is spread: the backoff alone."""


def measure() -> list[Result]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return uvloop.run(_rows())


async def _rows() -> list[Result]:
    rows = []
    for what, how in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        alone = await _measured(how, registrations_per_second=NO_HINTS)
        hinted = await _measured(how)
        rows += [
            Result(
                f"{AGENTS} agents, server {what}: most registrations within a second",
                "backoff alone",
                f"{hinted.peak_asked / alone.peak_asked:.2f}×",
                "recorded",
                f"{hinted.peak_asked} against {alone.peak_asked}",
            ),
            Result(
                f"{AGENTS} agents, server {what}: time until all are back",
                "backoff alone",
                f"{hinted.all_s / alone.all_s:.1f}×",
                "recorded",
                f"{hinted.all_s:.1f} s against {alone.all_s:.1f} s; half after {hinted.median_s:.1f} s",
            ),
            Result(
                f"{AGENTS} agents, server {what}: the server's processor until then",
                "backoff alone",
                f"{hinted.server_cpu_s / alone.server_cpu_s:.1f}×",
                "recorded",
                f"{hinted.server_cpu_s:.1f} s against {alone.server_cpu_s:.1f} s",
            ),
        ]
    return rows


async def _measured(how: signal.Signals, **settings: float) -> Return:
    with server_process(**settings) as server:
        async with fleet_of(server, AGENTS) as fleet:
            await asyncio.sleep(12)  # everybody has had an answer to a heartbeat, and with it the policy
            result = await cut_off(fleet, how, AWAY_S)
    print(f"{how.name} {settings or ''}: {result.sentence()}", file=sys.stderr, flush=True)
    return result
