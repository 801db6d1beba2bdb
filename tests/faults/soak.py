"""The soak: a server and an agent under load with kills, cuts, freezes and restarts at random.

    make soak MINUTES=30            or    python -m tests.faults.soak --minutes 30 --seed 7

Half of the time anything may be killed. Then both processes stay alive through cuts and load: their memory and file
descriptors are measured after a warm-up, then eleven times more, and have to be flat. At last everything is let come
to its end, and the checker of the fault tests compares server, agent, engine and disk. Prints what was done and found,
as JSON; exit code 1 if a promise was broken or something grew.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from outrider.v1 import types_pb2 as types
from tests.faults.checker import collect, compare
from tests.faults.proxy import Proxy
from tests.faults.rig import PATIENCE_S, TERMINAL, Expected, Rig, expected_of, pipeline, step_of

IN_FLIGHT = 4
SETTLE_S = 180.0
GROWTH_BYTES = 12 * 1024**2
GROWTH_SHARE = 0.10
GROWTH_FILES = 12


@dataclass
class Tally:
    """What was done. Counters only ever grow."""

    seed: int
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    cuts: collections.Counter[str] = field(default_factory=collections.Counter)
    stops: collections.Counter[str] = field(default_factory=collections.Counter)
    runs: int = 0
    cancels: int = 0
    repeated_keys: int = 0
    ended: collections.Counter[str] = field(default_factory=collections.Counter)


class Load:
    """Keeps a few runs going, of many shapes, and cancels some; repeats requests as nervous callers do."""

    def __init__(self, rig: Rig, tally: Tally, rng: random.Random) -> None:
        self._rig, self._tally, self._rng = rig, tally, rng
        self._open: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self.problem: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No more runs; those that are under way go on."""
        self._over.set()
        self._thread.join(PATIENCE_S * 2)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._forget_ended()
                if len(self._open) < IN_FLIGHT:
                    self._open.add(self._execute())
                elif self._rng.random() < 0.02:
                    self._rig.cancel(self._rng.choice(sorted(self._open)), "the soak")
                    self._tally.cancels += 1
                else:
                    time.sleep(0.2)
        except BaseException as error:
            self.problem = error

    def _execute(self) -> str:
        text, expected = _shape(self._rng)
        self._tally.runs += 1
        key = f"soak-{self._tally.runs}"
        object_ = self._rng.choice(["", "game/a", "game/b"])
        run_id = self._rig.execute(text, key=key, object_=object_, expected=expected, within_s=PATIENCE_S * 2)
        if self._rng.random() < 0.1:
            self._tally.repeated_keys += 1
            again = self._rig.execute(text, key=key, object_=object_, expected=expected, within_s=PATIENCE_S * 2)
            assert again == run_id, f"the key {key} made two runs: {run_id} and {again}"
        return run_id

    def _forget_ended(self) -> None:
        for run_id in sorted(self._open):
            state = self._rig.run(run_id).state
            if state in TERMINAL:
                self._open.discard(run_id)


def _shape(rng: random.Random) -> tuple[str, dict[str, Expected]]:
    """A pipeline and what its steps write."""
    lines = rng.choice([2, 20, 200])
    pause_s = rng.choice([0.0, 0.0, 0.02])
    wanted = {name: expected_of(name, lines) for name in ("a", "b", "z")}
    a = step_of("a", lines=lines, pause_s=pause_s)
    b = step_of("b", lines=lines)
    match rng.randrange(4):
        case 0:
            steps = [a]
        case 1:
            steps = [a, b]
        case 2:
            steps = [a | {"needs": []}, b | {"needs": []}, step_of("z", lines=lines, needs=["a", "b"])]
        case _:
            # Fails temporarily once, and then cleans up.
            once = '[ "$OUTRIDER_ATTEMPT" != 1 ] || exit 75'
            retry = {"max": 2, "first_wait": "100ms"}
            steps = [
                step_of("a", lines=lines, then=once, retry=retry),
                b,
                step_of("z", lines=lines, **{"if": "always()"}),
            ]
    return pipeline(*steps, volumes={"work": {}}), wanted


class Monkey:
    """Breaks things, one at a time, and mends them."""

    def __init__(self, rig: Rig, proxy: Proxy, tally: Tally, rng: random.Random) -> None:
        self._rig, self._proxy, self._tally, self._rng = rig, proxy, tally, rng

    def kill_something(self) -> None:
        self._rng.choice(
            [self._kill_agent, self._kill_server, self._kill_both, self._restart, self._freeze, self.cut]
        )()

    def cut(self) -> None:
        """A cut, a silence, a slow link; both processes live through it."""
        proxy = self._proxy
        kind = self._rng.choice(["reset", "silent up", "silent down", "silent", "slow"])
        self._tally.cuts[kind] += 1
        if kind == "reset":
            for _ in range(self._rng.randint(1, 3)):
                proxy.cut()
                time.sleep(self._rng.uniform(0.2, 2))
        elif kind == "slow":
            proxy.delay_s = 0.3
            time.sleep(self._rng.uniform(2, 6))
            proxy.delay_s = 0.0
        else:
            ways: dict[str, tuple[Any, ...]] = {
                "silent up": ("up",),
                "silent down": ("down",),
                "silent": ("up", "down"),
            }
            proxy.stall(*ways[kind])
            time.sleep(self._rng.uniform(0.5, 5))
            if self._rng.random() < 0.5:
                proxy.cut()
            proxy.flow()

    def _kill_agent(self) -> None:
        self._rig.agent.kill()
        self._tally.kills["agent"] += 1
        self._pause_maybe()
        self._rig.start_agent()

    def _kill_server(self) -> None:
        self._rig.server.kill()
        self._tally.kills["server"] += 1
        self._pause_maybe()
        self._rig.start_server()

    def _kill_both(self) -> None:
        self._rig.server.kill()
        self._rig.agent.kill()
        self._tally.kills["server"] += 1
        self._tally.kills["agent"] += 1
        self._rig.start_server()
        self._pause_maybe()
        self._rig.start_agent()

    def _restart(self) -> None:
        if self._rng.random() < 0.5:
            self._rig.agent.stop()
            self._rig.start_agent()
        else:
            self._rig.server.stop()
            self._rig.start_server()
        self._tally.stops["restart in order"] += 1

    def _freeze(self) -> None:
        child = self._rng.choice([self._rig.agent, self._rig.server])
        child.freeze()
        time.sleep(self._rng.uniform(0.5, 6))
        child.thaw()
        self._tally.stops["freeze"] += 1

    def _pause_maybe(self) -> None:
        if self._rng.random() < 0.5:
            time.sleep(self._rng.uniform(0, 4))


@dataclass(frozen=True, slots=True)
class Size:
    """How big a process is."""

    memory_bytes: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Size:
        memory = 0
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):  # what is shared with the process that it was forked from is not its own
                memory = int(line.split()[1]) * 1024
        return cls(memory, len(list(Path(f"/proc/{pid}/fd").iterdir())))

    def grew(self, later: Size) -> list[str]:
        found = []
        allowed = max(GROWTH_BYTES, round(self.memory_bytes * GROWTH_SHARE))
        if later.memory_bytes - self.memory_bytes > allowed:
            found.append(f"memory grew from {self.memory_bytes >> 20} to {later.memory_bytes >> 20} MiB")
        if later.files - self.files > GROWTH_FILES:
            found.append(f"open files grew from {self.files} to {later.files}")
        return found


def soak(minutes: float, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it; what was done, measured and found."""
    rng = random.Random(seed)
    tally = Tally(seed)
    began = time.monotonic()
    problems: list[str] = []
    with Proxy() as proxy, Rig.start(agent={"server": proxy.address}, running=False) as rig:
        proxy.target = (rig.address.rpartition(":")[0], int(rig.address.rpartition(":")[2]))
        rig.start_server()
        rig.start_agent()
        rig.until_online()
        for name in ("game/a", "game/b"):
            rig.set_object(name)
        load, monkey = Load(rig, tally, rng), Monkey(rig, proxy, tally, random.Random(seed + 1))
        load.start()
        say("anything may be killed")
        _while(began, minutes * 30, load, monkey.kill_something, rng)
        say("both live on, through cuts")
        middle = time.monotonic()
        _while(middle, minutes * 10, load, monkey.cut, rng)
        sizes = [_sizes(rig)]
        for tenth in range(1, 11):
            _while(middle, minutes * (10 + 3 * tenth), load, monkey.cut, rng)
            sizes.append(_sizes(rig))
        load.stop()
        proxy.flow()
        say("everything comes to its end")
        if load.problem is not None:
            problems.append(f"the load broke off: {type(load.problem).__name__}: {load.problem}")
        problems += _settle(rig)
        problems += [
            f"the {name} ended by itself: {getattr(rig, name).poll()}"
            for name in ("agent", "server")
            if getattr(rig, name).poll() is not None
        ]
        sizes.append(_sizes(rig))
        for name, size in sizes[0].items():
            problems += [f"{name}: {each}" for each in size.grew(sizes[-1][name])]
        facts = collect(rig)
        for run in facts.runs.values():
            tally.ended[types.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()] += 1
        attempts = sum(len(each) for each in facts.marks.values())
        return {
            "minutes": round((time.monotonic() - began) / 60, 1),
            "seed": seed,
            "runs": tally.runs,
            "ended": dict(tally.ended),
            "attempts": attempts,
            "cancels": tally.cancels,
            "keys_repeated": tally.repeated_keys,
            "kills": dict(tally.kills),
            "cuts": dict(tally.cuts),
            "stops": dict(tally.stops),
            "log_bytes": sum(len(log.data) for log in facts.logs.values()),
            "lost": sum(run_id not in facts.runs for run_id in facts.accepted),
            "ran_twice": sum(len(each) != len(set(each)) for each in facts.marks.values()),
            "memory_mib": {name: [each[name].memory_bytes >> 20 for each in sizes] for name in sizes[0]},
            "files": {name: [each[name].files for each in sizes] for name in sizes[0]},
            "containers": len(facts.containers),
            "problems": problems,
            "output": rig.output() if problems else "",
        }


def _sizes(rig: Rig) -> dict[str, Size]:
    """Of both processes; of one that has ended, nothing."""
    return {
        name: Size.of(child.pid) if child.poll() is None else Size(0, 0)
        for name, child in (("agent", rig.agent), ("server", rig.server))
    }


def _while(since: float, seconds: float, load: Load, act: Callable[[], None], rng: random.Random) -> None:
    while time.monotonic() - since < seconds and load.problem is None:
        act()
        time.sleep(rng.uniform(0.2, 3))


def _settle(rig: Rig) -> list[str]:
    """What the checker still finds once all had time to come to its end."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            problems = compare(collect(rig))
        except (grpc.RpcError, OSError) as error:
            problems = [f"the facts could not be collected: {error}"]
        if not problems or time.monotonic() > deadline:
            return problems
        time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    print(f"soak: {given.minutes:g} minutes, seed {given.seed}", file=sys.stderr)
    found = soak(given.minutes, given.seed, lambda text: print(f"soak: {text}", file=sys.stderr))
    output = found.pop("output")
    print(json.dumps(found, indent=2))
    if found["problems"]:
        print(output, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
