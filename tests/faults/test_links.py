"""Bad links between one server and one agent, both real processes: whatever happens on the way, each step runs once,
every byte of its log arrives once, and the run has one end."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import types_pb2 as types
from tests.faults.launcher import Launcher
from tests.faults.proxy import Proxy, Way
from tests.faults.rig import Rig, expected_of, pipeline, step_of

WAYS = [
    pytest.param(("up",), id="up"),
    pytest.param(("down",), id="down"),
    pytest.param(("up", "down"), id="both", marks=pytest.mark.long),
]
INTERVAL_S = 0.5  # of the rig's server
SILENCE_S = 2 * INTERVAL_S * 1.2
PATIENCE_S = 10.0
"""Far more than the silence, for slow machines, and far less than the 30 s after which gRPC itself notices."""


@pytest.fixture(scope="module")
def shared(launcher: Launcher) -> Iterator[tuple[Rig, Proxy]]:
    """One server, and one agent that reaches it through a proxy, for all tests of this module."""
    with Proxy() as proxy, Rig.start(agent={"server": proxy.address}, launcher=launcher, running=False) as rig:
        host, _, port = rig.address.rpartition(":")
        proxy.target = (host, int(port))
        rig.start_server()
        rig.start_agent()
        yield rig, proxy


@pytest.fixture
def link(shared: tuple[Rig, Proxy]) -> Iterator[tuple[Rig, Proxy]]:
    """The same, healed of what the test before did to it."""
    rig, proxy = shared
    heal(proxy)
    rig.until(lambda: rig.node().online and connected(rig), what="the link")
    yield shared
    heal(proxy)


def heal(proxy: Proxy) -> None:
    proxy.delay_s, proxy.reset_every_s, proxy.truncate_after, proxy.recording = 0.0, None, None, False
    proxy.flow()
    proxy.let_go()


_names = itertools.count()


def named(first: str) -> str:
    """A step's name that no other test's step has: what releases it stays in the volume."""
    return f"{first}{next(_names)}"


def chatty() -> str:
    """Two steps, one after the other, that write for two seconds."""
    first, second = named("a"), named("b")
    return pipeline(step_of(first, pause_s=0.05), step_of(second, pause_s=0.05) | {"needs": [first]})


def held(rig: Rig) -> tuple[str, str, str]:
    """A run whose first step waits to be released, and whose second follows; the run and both names."""
    first, second = named("a"), named("b")
    run_id = rig.execute(pipeline(step_of(first, held=True), step_of(second) | {"needs": [first]}))
    rig.until_running(run_id, first)
    return run_id, first, second


def succeeded(rig: Rig, run_id: str) -> None:
    assert rig.ended(run_id).state == types.RUN_STATE_SUCCEEDED, rig.output()
    rig.check()


def connected(rig: Rig) -> bool:
    return bool(rig.status().get("server", {}).get("connected"))


def events_of(rig: Rig, prefix: str, after: int = -1) -> list[types.Event]:
    wish = cs.SubscribeEventsRequest(after=after, filter=cs.EventFilter(types=[prefix]))
    return list(rig.operator.stream("SubscribeEvents", iter([wish])))


def epoch(rig: Rig) -> int:
    return int(rig.node().epoch)


# -- what the proxy does -----------------------------------------------------------------------------------


def test_a_slow_link_changes_nothing(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    before = epoch(rig)
    proxy.delay_s = 0.2
    began = time.monotonic()
    run_id = rig.execute(chatty())
    succeeded(rig, run_id)
    assert time.monotonic() - began > 2.0  # as long as its steps write, and the way there and back
    assert epoch(rig) == before


def test_a_link_that_is_reset_every_second_loses_and_repeats_nothing(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    before = epoch(rig)
    proxy.reset_every_s = 1.0
    resets = proxy.resets
    proxy.cut()
    run_id = rig.execute(chatty())
    succeeded(rig, run_id)
    proxy.reset_every_s = None
    assert proxy.resets - resets >= 3
    rig.until_online()
    assert epoch(rig) == before  # resumed each time


def test_connections_that_end_in_the_middle_of_a_message_lose_and_repeat_nothing(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    sizes = itertools.cycle([6000, 7001, 9000, 12007, 16000])
    proxy.truncate_after = next(sizes)
    truncated = proxy.truncated
    proxy.cut()
    run_id = rig.execute(chatty())
    while rig.run(run_id).state not in (types.RUN_STATE_SUCCEEDED, types.RUN_STATE_FAILED, types.RUN_STATE_UNKNOWN):
        seen = proxy.truncated
        rig.until(
            lambda seen=seen: proxy.truncated > seen or rig.run(run_id).state > types.RUN_STATE_RUNNING,
            what="another truncation",
        )
        proxy.truncate_after = next(sizes)
        if proxy.truncated - truncated >= 6:
            proxy.truncate_after = None
            break
    assert proxy.truncated - truncated >= 2
    proxy.truncate_after = None
    proxy.cut()
    succeeded(rig, run_id)


@pytest.mark.parametrize("ways", WAYS)
def test_a_half_open_link_is_noticed_on_both_sides_within_two_heartbeats(
    link: tuple[Rig, Proxy], ways: tuple[Way, ...]
) -> None:
    rig, proxy = link
    run_id, first, _ = held(rig)
    before = epoch(rig)
    began = time.monotonic()
    proxy.stall(*ways)
    rig.until(lambda: not rig.node().online, PATIENCE_S, "the server's notice")
    rig.until(lambda: not connected(rig), PATIENCE_S, "the agent's notice")
    assert time.monotonic() - began >= SILENCE_S - 2 * INTERVAL_S * 1.2 * 0.75  # by silence, not by a closed socket
    rig.release(first)  # it ends while nobody hears of it
    proxy.flow()
    proxy.cut()
    succeeded(rig, run_id)
    assert epoch(rig) == before


def test_what_an_old_connection_had_under_way_does_no_harm_when_it_arrives_after_the_new_one(
    link: tuple[Rig, Proxy],
) -> None:
    rig, proxy = link
    run_id, first, _ = held(rig)
    connections = proxy.connections
    assert proxy.hold_back() >= 1
    rig.release(first)  # reports and log of its end are sent into the old connection first
    rig.until(lambda: proxy.connections > connections and connected(rig), what="a new connection")
    rig.until(lambda: rig.step_state(run_id, first) == types.STEP_STATE_SUCCEEDED, what="the end of the first step")
    proxy.let_go()
    succeeded(rig, run_id)


def test_a_replay_of_whole_connections_is_worth_nothing(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    proxy.recording = True
    connections = proxy.connections
    proxy.cut()
    rig.until(lambda: connected(rig) and proxy.connections > connections, what="a recorded connection")
    run_id = rig.execute(chatty())
    rig.ended(run_id)
    rig.agent.stop()
    rig.until(lambda: proxy.recorded, what="the recording")
    before, told = epoch(rig), len(events_of(rig, "node."))
    assert sum(map(len, proxy.recorded)) > 5000
    proxy.replay()
    assert epoch(rig) == before
    assert len(events_of(rig, "node.")) == told  # nobody came online
    rig.start_agent()
    succeeded(rig, run_id)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("every_s", [0.4, 0.7, 1.9, 3.1])
def test_links_that_are_reset_again_and_again_lose_and_repeat_nothing(link: tuple[Rig, Proxy], every_s: float) -> None:
    rig, proxy = link
    resets = proxy.resets
    proxy.reset_every_s = every_s
    proxy.cut()
    runs = [rig.execute(chatty()) for _ in range(4)]
    for run_id in runs:
        assert rig.ended(run_id, 120).state == types.RUN_STATE_SUCCEEDED, rig.output()
    proxy.reset_every_s = None
    assert proxy.resets - resets >= 2
    rig.check()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_connection_may_end_after_any_number_of_bytes(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    name = named("a")
    run_id = rig.execute(pipeline(step_of(name, lines=60, pause_s=0.3)), expected={name: expected_of(name, 60)})
    sizes = [3000 + 1217 * number for number in range(12)]
    for size in sizes:
        truncated = proxy.truncated
        proxy.truncate_after = size
        proxy.cut()
        rig.until(lambda truncated=truncated: proxy.truncated > truncated, what=f"a connection cut at {size}")
        proxy.truncate_after = None  # where it never gets as far as a heartbeat, the agent waits longer and longer
        rig.until(lambda: connected(rig), what="the connection after it")
    assert rig.ended(run_id, 200).state == types.RUN_STATE_SUCCEEDED
    rig.check()


# -- packets that vanish -----------------------------------------------------------------------------------


class Firewall:
    """Drops packets of the loopback interface that go to, or come from, one port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._rules: list[list[str]] = []

    def drop(self, *ways: Way) -> None:
        for way in ways:
            match = "--dport" if way == "up" else "--sport"
            rule = ["INPUT", "-i", "lo", "-p", "tcp", match, str(self._port), "-j", "DROP"]
            self._iptables("-I", rule)
            self._rules.append(rule)

    def lift(self) -> None:
        while self._rules:
            self._iptables("-D", self._rules.pop())

    @staticmethod
    def _iptables(how: str, rule: list[str]) -> None:
        subprocess.run(["iptables", "-w", how, *rule], check=True, capture_output=True)


@pytest.fixture
def firewall(link: tuple[Rig, Proxy]) -> Iterator[Firewall]:
    made = Firewall(link[1].port)
    try:
        yield made
    finally:
        made.lift()


@pytest.mark.parametrize("ways", WAYS)
def test_dropped_packets_are_noticed_on_both_sides_and_made_good(
    link: tuple[Rig, Proxy], firewall: Firewall, ways: tuple[Way, ...]
) -> None:
    rig, _ = link
    run_id, first, second = held(rig)
    before = epoch(rig)
    firewall.drop(*ways)
    rig.until(lambda: not rig.node().online, PATIENCE_S, "the server's notice")
    rig.until(lambda: not connected(rig), PATIENCE_S, "the agent's notice")
    rig.release(first)
    rig.until(
        lambda: (rig.marks / f"ran-{run_id}-{second}").exists(), what="the second step, though nobody hears of it"
    )
    firewall.lift()
    succeeded(rig, run_id)
    assert epoch(rig) == before


# -- processes that stand still ----------------------------------------------------------------------------


def test_a_server_that_was_stopped_for_a_while_loses_nobody(link: tuple[Rig, Proxy]) -> None:
    rig, _ = link
    run_id, first, _ = held(rig)
    before, told = epoch(rig), events_of(rig, "node.")[-1].sequence
    rig.server.freeze()
    rig.until(lambda: not connected(rig), PATIENCE_S, "the agent's notice")
    time.sleep(2.0)  # well beyond all that the server would wait for
    rig.server.thaw()
    rig.until(lambda: connected(rig), what="the connection")
    rig.release(first)
    succeeded(rig, run_id)
    assert not events_of(rig, "node.", told)
    assert epoch(rig) == before


def test_an_agent_that_was_stopped_for_a_while_goes_on_where_it_was(link: tuple[Rig, Proxy]) -> None:
    rig, _ = link
    run_id, first, _ = held(rig)
    before = epoch(rig)
    rig.agent.freeze()
    rig.until(lambda: not rig.node().online, PATIENCE_S, "the server's notice")
    rig.release(first)  # its container ends while its agent stands still
    time.sleep(1.0)
    rig.agent.thaw()
    succeeded(rig, run_id)
    assert epoch(rig) == before


_JUMPING_CLOCK = """
import os, time
_file, _time, _time_ns = os.environ["JUMP_FILE"], time.time, time.time_ns
def _ahead():
    try:
        with open(_file) as file:
            return float(file.read() or 0)
    except (OSError, ValueError):
        return 0.0
time.time = lambda: _time() + _ahead()
time.time_ns = lambda: _time_ns() + int(_ahead() * 1e9)
"""


def test_a_wall_clock_that_jumps_changes_nothing_but_timestamps(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_JUMPING_CLOCK)
    jump = tmp_path / "jump"
    shim = {"PYTHONPATH": str(tmp_path), "JUMP_FILE": str(jump)}
    with Rig.start(launcher=launcher, running=False) as rig:
        rig.server_prefix = rig.agent_prefix = ("env",)
        rig.server_env = rig.agent_env = shim
        rig.start_server()
        rig.start_agent()
        rig.until_online()
        first = named("a")
        text = json.loads(pipeline(step_of(first, held=True), step_of(named("b")) | {"needs": [first]}))
        text["steps"][0]["timeout"] = "10m"
        run_id = rig.execute(json.dumps(text), timeout_s=900)
        rig.until_running(run_id, first)
        for ahead_s in (400 * 86400, -400 * 86400):
            jump.write_text(str(ahead_s))
            seen = rig.node().last_seen.seconds
            rig.until(
                lambda seen=seen: abs(rig.node().last_seen.seconds - seen) > 86400, what="heartbeats after the jump"
            )
            assert rig.node().online
            assert rig.run(run_id).state == types.RUN_STATE_RUNNING
        rig.release(first)
        succeeded(rig, run_id)
        assert [event.type for event in events_of(rig, "node.o")] == ["node.online"]
