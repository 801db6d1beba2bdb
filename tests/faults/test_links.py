"""Bad links between one server and one agent, both real processes: whatever happens on the way, each step runs once,
every byte of its log arrives once, and the run has one end."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import types_pb2 as types
from tests.faults.launcher import Launcher
from tests.faults.proxy import Proxy, Way
from tests.faults.rig import Rig, pipeline, step_of

INTERVAL_S = 0.5  # of the rig's server
SILENCE_S = 2 * INTERVAL_S * 1.2
PATIENCE_S = 10.0
"""Far more than the silence, for slow machines, and far less than the 30 s after which gRPC itself notices."""


@contextmanager
def linked(launcher: Launcher) -> Iterator[tuple[Rig, Proxy]]:
    with Proxy() as proxy, Rig.start(agent={"server": proxy.address}, launcher=launcher, running=False) as rig:
        host, _, port = rig.address.rpartition(":")
        proxy.target = (host, int(port))
        rig.start_server()
        rig.start_agent()
        rig.until_online()
        yield rig, proxy


@pytest.fixture
def link(launcher: Launcher) -> Iterator[tuple[Rig, Proxy]]:
    with linked(launcher) as made:
        yield made


def chatty() -> str:
    """Two steps, one after the other, that write for two seconds."""
    first, second = step_of("a", pause_s=0.05), step_of("b", pause_s=0.05)
    return pipeline(first, second | {"needs": ["a"]})


def succeeded(rig: Rig, run_id: str) -> None:
    assert rig.ended(run_id).state == types.RUN_STATE_SUCCEEDED, rig.output()
    rig.check()


def connected(rig: Rig) -> bool:
    return bool(rig.status().get("server", {}).get("connected"))


def events_of(rig: Rig, prefix: str) -> list[types.Event]:
    wish = cs.SubscribeEventsRequest(after=-1, filter=cs.EventFilter(types=[prefix]))
    return list(rig.operator.stream("SubscribeEvents", iter([wish])))


def epoch(rig: Rig) -> int:
    return int(rig.node().epoch)


# -- what the proxy does -----------------------------------------------------------------------------------


def test_a_slow_link_changes_nothing(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    proxy.delay_s = 0.3
    run_id = rig.execute(chatty())
    succeeded(rig, run_id)
    assert proxy.connections == 1  # nobody took slow for dead


def test_a_link_that_is_reset_every_second_loses_and_repeats_nothing(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    before = epoch(rig)
    proxy.reset_every_s = 1.0
    proxy.cut()
    run_id = rig.execute(chatty())
    succeeded(rig, run_id)
    proxy.reset_every_s = None
    assert proxy.resets >= 3
    rig.until_online()
    assert epoch(rig) == before  # resumed each time


def test_connections_that_end_in_the_middle_of_a_message_lose_and_repeat_nothing(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    sizes = itertools.cycle([6000, 7001, 9000, 12007, 16000])
    proxy.truncate_after = next(sizes)
    proxy.cut()
    run_id = rig.execute(chatty())
    while rig.run(run_id).state not in (types.RUN_STATE_SUCCEEDED, types.RUN_STATE_FAILED, types.RUN_STATE_UNKNOWN):
        seen = proxy.truncated
        rig.until(
            lambda seen=seen: proxy.truncated > seen or rig.run(run_id).state > types.RUN_STATE_RUNNING,
            what="another truncation",
        )
        proxy.truncate_after = next(sizes)
        if proxy.truncated >= 6:
            proxy.truncate_after = None
            break
    assert proxy.truncated >= 2
    proxy.truncate_after = None
    proxy.cut()
    succeeded(rig, run_id)


@pytest.mark.parametrize("ways", [("up",), ("down",), ("up", "down")], ids="-".join)
def test_a_half_open_link_is_noticed_on_both_sides_within_two_heartbeats(
    link: tuple[Rig, Proxy], ways: tuple[Way, ...]
) -> None:
    rig, proxy = link
    run_id = rig.execute(pipeline(step_of("a", held=True)))
    rig.until_running(run_id, "a")
    before = epoch(rig)
    began = time.monotonic()
    proxy.stall(*ways)
    rig.until(lambda: not rig.node().online, PATIENCE_S, "the server's notice")
    rig.until(lambda: not connected(rig), PATIENCE_S, "the agent's notice")
    assert time.monotonic() - began >= SILENCE_S - 2 * INTERVAL_S * 1.2 * 0.75  # by silence, not by a closed socket
    rig.release("a")  # it ends while nobody hears of it
    proxy.flow()
    proxy.cut()
    succeeded(rig, run_id)
    assert epoch(rig) == before


def test_what_an_old_connection_had_under_way_does_no_harm_when_it_arrives_after_the_new_one(
    link: tuple[Rig, Proxy],
) -> None:
    rig, proxy = link
    run_id = rig.execute(pipeline(step_of("a", held=True), step_of("b") | {"needs": ["a"]}))
    rig.until_running(run_id, "a")
    assert proxy.hold_back() >= 1
    rig.release("a")  # reports and log of its end are sent into the old connection first
    rig.until(lambda: proxy.connections >= 2 and connected(rig), what="a new connection")
    rig.until(lambda: rig.step_state(run_id, "a") == types.STEP_STATE_SUCCEEDED, what="the end of a")
    proxy.let_go()
    succeeded(rig, run_id)


def test_a_replay_of_whole_connections_is_worth_nothing(link: tuple[Rig, Proxy]) -> None:
    rig, proxy = link
    proxy.recording = True
    proxy.cut()
    rig.until(lambda: connected(rig) and proxy.connections >= 2, what="a recorded connection")
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


@pytest.mark.parametrize("ways", [("up",), ("down",), ("up", "down")], ids="-".join)
def test_dropped_packets_are_noticed_on_both_sides_and_made_good(
    link: tuple[Rig, Proxy], firewall: Firewall, ways: tuple[Way, ...]
) -> None:
    rig, _ = link
    run_id = rig.execute(pipeline(step_of("a", held=True), step_of("b") | {"needs": ["a"]}))
    rig.until_running(run_id, "a")
    before = epoch(rig)
    firewall.drop(*ways)
    rig.until(lambda: not rig.node().online, PATIENCE_S, "the server's notice")
    rig.until(lambda: not connected(rig), PATIENCE_S, "the agent's notice")
    rig.release("a")
    rig.until(lambda: (rig.marks / f"ran-{run_id}-b").exists(), what="b, though nobody hears of it")
    firewall.lift()
    succeeded(rig, run_id)
    assert epoch(rig) == before


# -- processes that stand still ----------------------------------------------------------------------------


def test_a_server_that_was_stopped_for_a_while_loses_nobody(rig: Rig) -> None:
    run_id = rig.execute(pipeline(step_of("a", held=True)))
    rig.until_running(run_id, "a")
    before = epoch(rig)
    rig.server.freeze()
    rig.until(lambda: not connected(rig), PATIENCE_S, "the agent's notice")
    time.sleep(2.0)  # well beyond all that the server would wait for
    rig.server.thaw()
    rig.until(lambda: connected(rig), what="the connection")
    rig.release("a")
    succeeded(rig, run_id)
    assert [event.type for event in events_of(rig, "node.o")] == ["node.online"]
    assert epoch(rig) == before


def test_an_agent_that_was_stopped_for_a_while_goes_on_where_it_was(rig: Rig) -> None:
    run_id = rig.execute(pipeline(step_of("a", held=True), step_of("b") | {"needs": ["a"]}))
    rig.until_running(run_id, "a")
    before = epoch(rig)
    rig.agent.freeze()
    rig.until(lambda: not rig.node().online, PATIENCE_S, "the server's notice")
    rig.release("a")  # its container ends while its agent stands still
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
        text = json.loads(pipeline(step_of("a", held=True), step_of("b") | {"needs": ["a"]}))
        text["steps"][0]["timeout"] = "10m"
        run_id = rig.execute(json.dumps(text), timeout_s=900)
        rig.until_running(run_id, "a")
        for ahead_s in (400 * 86400, -400 * 86400):
            jump.write_text(str(ahead_s))
            seen = rig.node().last_seen.seconds
            rig.until(
                lambda seen=seen: abs(rig.node().last_seen.seconds - seen) > 86400, what="heartbeats after the jump"
            )
            assert rig.node().online
            assert rig.run(run_id).state == types.RUN_STATE_RUNNING
        rig.release("a")
        succeeded(rig, run_id)
        assert [event.type for event in events_of(rig, "node.o")] == ["node.online"]
