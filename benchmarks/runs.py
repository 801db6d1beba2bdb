"""Runs of trivial steps against as many `docker run --rm` of the same image."""

from __future__ import annotations

import asyncio
import time
from statistics import median

from benchmarks._rig import Client, Result, Rig, dev, docker_runs, trivial_pipeline

# (steps, aim, rounds): the two sides take turns, so that a drifting machine drifts for both.
SEQUENCES = ((1, 1.0, 9), (3, 0.6, 7), (10, 0.45, 5))
SIDE_BY_SIDE, SIDE_STEPS, SIDE_AIM, SIDE_ROUNDS = 4, 10, 2.5, 3
PAUSE_S = 1.0  # between runs: a busy node runs one pipeline after another, but not within the same second


def measure() -> list[Result]:
    with dev() as rig:
        return asyncio.run(_measure(rig))


async def _measure(rig: Rig) -> list[Result]:
    results = []
    async with Client(rig.context) as client:
        await client.run(trivial_pipeline(1))
        await docker_runs(1)
        for steps, aim, rounds in SEQUENCES:
            ours, theirs = [], []
            for _ in range(rounds):
                theirs.append(await docker_runs(steps))
                await asyncio.sleep(PAUSE_S)
                ours.append(await client.run(trivial_pipeline(steps)))
                await asyncio.sleep(PAUSE_S)
            ratio = median(mine / yours for mine, yours in zip(ours, theirs, strict=True))
            results.append(
                Result(
                    f"a run of {steps} trivial step{'s' * (steps > 1)}, wall time",
                    f"{steps} × docker run --rm",
                    f"{ratio:.2f}×",
                    f"≤ {aim}×",
                    f"{median(ours) * 1000:.0f} ms against {median(theirs) * 1000:.0f} ms",
                )
            )
        results.append(await _side_by_side(client))
    return results


async def _side_by_side(client: Client) -> Result:
    ratios, ours, theirs = [], 0.0, 0.0
    for _ in range(SIDE_ROUNDS):
        started = time.perf_counter()
        await asyncio.gather(*(docker_runs(SIDE_STEPS) for _ in range(SIDE_BY_SIDE)))
        theirs = time.perf_counter() - started
        await asyncio.sleep(PAUSE_S)
        started = time.perf_counter()
        await asyncio.gather(*(client.run(trivial_pipeline(SIDE_STEPS)) for _ in range(SIDE_BY_SIDE)))
        ours = time.perf_counter() - started
        await asyncio.sleep(PAUSE_S)
        ratios.append(theirs / ours)
    total = SIDE_BY_SIDE * SIDE_STEPS
    return Result(
        f"{SIDE_BY_SIDE} runs of {SIDE_STEPS} side by side, rate",
        f"{SIDE_BY_SIDE} loops of docker run --rm",
        f"{median(ratios):.2f}×",
        f"≥ {SIDE_AIM}×",
        f"{total / ours:.1f} against {total / theirs:.1f} steps/s",
    )
