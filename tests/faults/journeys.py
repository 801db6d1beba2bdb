"""What an agent is killed on the way of: journeys that together come by every transition of its journal.

A journey is carried out by a `Traveller`, which starts the agent with failpoints armed and, whenever one of them has
killed it, starts it again with those that are left: one journey takes as many deaths as it has points to come by.
A transition that is in no journey fails `test_every_transition_has_a_journey`.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from agent_core.transitions import Transition
from outrider.v1 import control_service_pb2 as cs
from outrider.v1 import types_pb2 as types
from tests.faults import damage
from tests.faults.rig import BASE, Rig, pipeline, step_of

T = Transition
RUNS_AT_MOST = 6


class Traveller:
    """Carries out journeys on one rig. ``left``: the failpoints that are still to kill an agent."""

    def __init__(self, rig: Rig, points: Iterable[str]) -> None:
        self.rig = rig
        self.left = set(points)
        self.deaths: list[str] = []
        self._read = 0

    def start_agent(self) -> None:
        """Start it with what is left."""
        self.rig.start_agent(failpoints=",".join(f"{point}=kill" for point in sorted(self.left)))

    def again(self) -> None:
        """End the agent, however it is, and start it armed."""
        self.rig.agent.kill()
        self._note_death()
        self.start_agent()

    def tend(self) -> bool:
        """If the agent has died of one of its points: the next one. Whether it had."""
        if self.rig.agent.poll() is None:
            return False
        assert self._note_death(), f"the agent ended by itself: {self.rig.agent.poll()}\n{self.rig.output()}"
        self.start_agent()
        return True

    def until(self, holds: Callable[[], Any], what: str, within_s: float = 90.0) -> Any:
        """What ``holds`` gave as soon as it is true, while agents come and go."""
        deadline = time.monotonic() + within_s
        while not (found := holds()):
            if self.tend():
                deadline = time.monotonic() + within_s
            assert time.monotonic() < deadline, f"{what} did not come to hold; left: {self.left}\n{self.rig.output()}"
            time.sleep(0.03)
        return found

    def ended(self, run_id: str) -> types.Run:
        """The run, once it is over on the server and the agent has told all of it."""
        self.until(lambda: self.rig.run(run_id).state in (4, 5, 6, 7), f"the end of {run_id}")
        self.until(lambda: self._told(), "everything told")
        return self.rig.run(run_id)

    def everything(self, once: Callable[[], object]) -> None:
        """Go the way again until every point has killed an agent."""
        for _ in range(RUNS_AT_MOST):
            once()
            if not self.left:
                return
            self.again()  # some come only at a start
        raise AssertionError(f"no agent came by {sorted(self.left)}\n{self.rig.output()}")

    def _told(self) -> bool:
        status = self.rig.status()
        return bool(status) and status["outbox_depth"] == 0 and not status["runs"] and status["server"]["connected"]

    def _note_death(self) -> bool:
        with (self.rig.folder / "output.log").open("rb") as file:
            file.seek(self._read)
            said = file.read()
        self._read += len(said)
        fired = [line.split()[1].rstrip(b":").decode() for line in said.splitlines() if line.startswith(b"failpoint ")]
        self.deaths += fired
        self.rig.kills += len(fired)
        self.left -= set(fired)
        return bool(fired) and self.rig.agent.poll() == -signal.SIGKILL


@dataclass(frozen=True)
class Journey:
    """``goes``: once along the way. ``comes_by``: the transitions of which the suite relies on it. ``logs``: whether
    logs are compared: what a server had acknowledged before it was set back is on no node any more. ``restarts``:
    whether the game is restarted on the way."""

    comes_by: frozenset[Transition]
    goes: Callable[[Traveller], object]
    logs: bool = True
    restarts: bool = False

    def check(self, rig: Rig) -> None:
        """Whether all is as it should be at its end."""
        restarted = [_game_of(rig)] if self.restarts else []
        rig.check(logs=self.logs, restarted=restarted, replaced=[_life_of(rig)])


def _game_of(rig: Rig) -> str:
    return f"game-{rig.node_id}"


def _life_of(rig: Rig) -> str:
    return f"life-{rig.node_id}"


def plain(traveller: Traveller) -> None:
    """Two steps that share a volume of their run."""
    shared = {"marks": "/marks:rw", "work": "/area:rw"}
    text = pipeline(step_of("a", volumes=shared), step_of("b", volumes=shared), volumes={"work": {}})
    run = traveller.ended(traveller.rig.execute(text))
    assert run.state == types.RUN_STATE_SUCCEEDED, run


def retried(traveller: Traveller) -> None:
    """A step whose first attempt fails for a while."""
    text = pipeline(step_of("a", then='[ "$OUTRIDER_ATTEMPT" -ge 2 ] || exit 75', retry={"max": 3}))
    run = traveller.ended(traveller.rig.execute(text))
    assert run.state == types.RUN_STATE_SUCCEEDED, run
    assert run.steps[0].attempt == 2, run


def skipped(traveller: Traveller) -> None:
    """A step that is not to run."""
    text = pipeline(step_of("a"), step_of("b") | {"if": "${{ false }}"}, step_of("c"))
    run = traveller.ended(traveller.rig.execute(text))
    assert run.steps[1].state == types.STEP_STATE_SKIPPED, run
    assert run.state == types.RUN_STATE_SUCCEEDED, run


def waiting(traveller: Traveller) -> None:
    """A step that needs a secret of a server that is away."""
    rig = traveller.rig
    secret = cs.SetEnvSetRequest(name="faults")
    secret.values["KEY"] = "value-of-the-key"
    rig.operator.call("SetEnvSet", secret)
    last = step_of("b", then='echo "$KEY" | grep -q value-of-the-key', envs={"KEY": "faults.KEY"})
    text = pipeline(step_of("a", held=True), last, envs=[{"set": "faults"}])
    run_id = _with_a_running(traveller, text)
    rig.server.kill()
    traveller.again()  # envs live in memory alone: this agent has to ask for them again
    rig.release("a")
    traveller.until(lambda: _waits_for(rig, run_id, "b", "envs"), "step b waiting")
    rig.start_server()
    run = traveller.ended(run_id)
    assert run.state == types.RUN_STATE_SUCCEEDED, run
    (rig.marks / "go-a").unlink()


def cancelled(traveller: Traveller) -> None:
    """A run that is cancelled while its step runs."""
    rig = traveller.rig
    run_id = _with_a_running(traveller, pipeline(step_of("a", held=True)))
    rig.cancel(run_id)
    run = traveller.ended(run_id)
    assert run.state == types.RUN_STATE_CANCELLED, run


def managed(traveller: Traveller) -> None:
    """A game: started by a step, restarted and removed by an operator."""
    rig = traveller.rig
    name = _game_of(rig)
    start = {
        "name": "start",
        "uses": "container.start",
        "with": {
            "name": name,
            "image": BASE,
            "args": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"],
            "ports": [{"name": "game", "protocol": "udp"}],
            "volumes": {"saves": "/data:rw"},
            "stop_grace": "1s",
        },
        "volumes": {"saves": "/data:rw"},
        "idempotent": True,
    }
    run = traveller.ended(rig.execute(pipeline(start, volumes={"saves": {}})))
    assert run.state == types.RUN_STATE_SUCCEEDED, run
    assert rig.docker("inspect", "--format", "{{.State.Running}}", name).strip() == "true"
    _ordered(traveller, "RestartContainer", name)
    _ordered(traveller, "RemoveContainer", name)
    assert not rig.docker("ps", "-aq", "--filter", f"name=^{name}$").strip()
    traveller.until(traveller._told, "everything told")


def replaced(traveller: Traveller) -> None:
    """A game that fails its liveness, gives way to another both ways, and has a program run inside it."""
    rig = traveller.rig
    name, game = _life_of(rig), "game/faults"
    rig.set_object(game)

    def start(version: int, script: str, replace: str, **more: Any) -> dict[str, Any]:
        return {
            "name": "start",
            "uses": "container.start",
            "with": {
                "name": name,
                "image": BASE,
                "args": ["sh", "-c", f"trap 'exit 0' TERM; {script}; while :; do sleep 0.1; done"],
                "env": {"VERSION": str(version)},
                "ports": [{"name": "game", "protocol": "tcp+udp"}],
                "stop_grace": "1s",
                "replace": replace,
            }
            | more,
        }

    def version() -> str:
        env = rig.docker("inspect", "--format", "{{.State.Running}} {{.Config.Env}}", name)
        return env.partition("VERSION=")[2][:1] if env.startswith("true") else ""

    sick = start(
        1,
        "touch /tmp/alive; (sleep 1.5; rm /tmp/alive) &",
        "no",
        live={"exec": ["test", "-e", "/tmp/alive"], "interval": "1s", "failures": 1, "grace": "1s"},
        restart={"first_wait": "200ms", "longest_wait": "200ms"},
    )
    sick["with"]["args"][2] = sick["with"]["args"][2].replace("&;", "&")
    run = traveller.ended(rig.execute(pipeline(sick), object_=game))
    assert run.state == types.RUN_STATE_SUCCEEDED, run
    begun = rig.docker("inspect", "--format", "{{.State.StartedAt}}", name)
    traveller.until(
        lambda: rig.docker("inspect", "--format", "{{.State.StartedAt}}", name) != begun, "a restart for liveness"
    )
    look = {"name": "look", "uses": "container.exec", "with": {"name": name, "args": ["echo", "hi"], "capture": True}}
    # Again and again: how far it was read may be written down together with what its agent is killed at.
    chatty = start(2, "(while :; do echo up; sleep 0.3; done) & true", "start-first", live={"log": "gone wrong"})
    run = traveller.ended(rig.execute(pipeline(chatty, look), object_=game))
    assert run.state == types.RUN_STATE_SUCCEEDED, run
    assert version() == "2"
    seen = {T.MANAGED_LOG_SEEN.before, T.MANAGED_LOG_SEEN.after}
    traveller.until(lambda: not seen & traveller.left, "its log read for its liveness")
    never = start(3, "true", "stop-first", ready={"log": "never said", "timeout": "2s"})
    run = traveller.ended(rig.execute(pipeline(never), object_=game))
    assert run.state == types.RUN_STATE_FAILED, run
    traveller.until(lambda: version() == "2", "the former container back")
    run = traveller.ended(rig.execute(pipeline(start(4, "true", "stop-first")), object_=game))
    assert run.state == types.RUN_STATE_SUCCEEDED, run
    assert version() == "4"
    _ordered(traveller, "RemoveContainer", name)
    left = rig.docker("ps", "-aq", "--filter", f"name=^{name}").strip()
    assert not left, rig.docker("ps", "-a", "--filter", f"name=^{name}")
    traveller.until(traveller._told, "everything told")


def fenced(traveller: Traveller) -> None:
    """An agent that died between making a container and starting it."""
    rig = traveller.rig
    rig.agent.kill()
    rig.start_agent(failpoints="journal.attempt_created.after=kill")
    run_id = rig.execute(pipeline(step_of("a")))
    assert rig.agent.wait() == -signal.SIGKILL
    traveller._note_death()
    traveller.start_agent()
    run = traveller.ended(run_id)
    assert run.state == types.RUN_STATE_SUCCEEDED, run


def given_up(traveller: Traveller) -> None:
    """A run whose record can't be read any more."""
    rig = traveller.rig
    run_id = _with_a_running(traveller, pipeline(step_of("a", held=True)))
    rig.agent.kill()
    traveller._note_death()
    damage.spoil_run(rig.journal, run_id)
    traveller.start_agent()
    rig.release("a")
    run = traveller.ended(run_id)
    assert run.state == types.RUN_STATE_UNKNOWN, run
    (rig.marks / "go-a").unlink()


def rebuilt(traveller: Traveller, *, harm: Callable[[Path], None] = damage.tear) -> None:
    """A journal that is damaged while a step runs."""
    rig = traveller.rig
    run_id = _with_a_running(traveller, pipeline(step_of("a", held=True), step_of("b")))
    rig.agent.kill()
    traveller._note_death()
    harm(rig.journal)
    traveller.start_agent()
    traveller.until(lambda: rig.status().get("journal", {}).get("rebuilt_at"), "the journal rebuilt")
    rig.release("a")
    run = traveller.ended(run_id)
    assert run.state == types.RUN_STATE_SUCCEEDED, run
    (rig.marks / "go-a").unlink()


def retold(traveller: Traveller) -> None:
    """A server that was set back to before a run's end."""
    rig = traveller.rig
    run_id = _with_a_running(traveller, pipeline(step_of("a", held=True)))
    traveller.until(lambda: rig.step_state(run_id, "a") == types.STEP_STATE_RUNNING, "step a told")
    rig.server.stop()
    former = rig.folder / "former"
    shutil.copytree(rig.store.parent, former)
    rig.start_server()
    rig.release("a")
    assert traveller.ended(run_id).state == types.RUN_STATE_SUCCEEDED
    rig.server.kill()
    shutil.rmtree(rig.store.parent)
    former.rename(rig.store.parent)
    rig.start_server()
    assert traveller.ended(run_id).state == types.RUN_STATE_SUCCEEDED
    (rig.marks / "go-a").unlink()


def _with_a_running(traveller: Traveller, text: str) -> str:
    """The run of this pipeline, once its step a has begun, which goes on until it is released."""
    run_id = traveller.rig.execute(text)
    traveller.until(lambda: (traveller.rig.marks / f"ran-{run_id}-a").exists(), "step a running")
    return run_id


def _ordered(traveller: Traveller, method: str, name: str) -> None:
    """An operator's call about a container, repeated as a person would while agents come and go."""
    request = cs.ContainerRequest(
        request_id=f"{method}-{time.monotonic_ns()}", node_id=traveller.rig.node_id, name=name
    )
    request.force = True
    request.grace.FromSeconds(1)

    def done() -> bool:
        with contextlib.suppress(grpc.RpcError):
            traveller.rig.operator.call(method, request, within_s=0, timeout_s=5)
            return True
        return False

    traveller.until(done, method)


def _waits_for(rig: Rig, run_id: str, step: str, reason: str) -> bool:
    runs = rig.status().get("runs", [])
    return any(run["run_id"] == run_id and run["steps"].get(step) == f"waiting: {reason}" for run in runs)


JOURNEYS: dict[str, Journey] = {
    "plain": Journey(
        frozenset(
            {
                T.RUN_ACCEPTED, T.LOG_OPENED, T.IDENTITY_ALLOTTED, T.VOLUME_ALLOTTED, T.NETWORK_LEASED,
                T.ATTEMPT_INTENDED, T.ATTEMPT_CREATED, T.ATTEMPT_STARTED, T.ATTEMPT_EXITED, T.ATTEMPT_SETTLED,
                T.RUN_FINISHED, T.OUTBOX_ACKNOWLEDGED, T.LOG_ACKNOWLEDGED, T.VOLUME_RELEASED, T.VOLUME_REMOVED,
                T.IDENTITY_RELEASED, T.NETWORK_RETURNED, T.SESSION_KEPT, T.TIME_SPENT, T.FORGOTTEN,
            }
        ),
        plain,
    ),
    "retried": Journey(frozenset({T.ATTEMPT_RETRIED}), retried),
    "skipped": Journey(frozenset({T.STEP_ENDED}), skipped),
    "waiting": Journey(frozenset({T.STEP_WAITING}), waiting),
    "cancelled": Journey(frozenset({T.RUN_CANCELLED}), cancelled),
    "managed": Journey(
        frozenset(
            {
                T.PORTS_LEASED, T.VOLUME_USED, T.MANAGED_STARTING, T.MANAGED_READY, T.COMMAND_RECEIVED,
                T.RESTART_INTENDED, T.COMMAND_ANSWERED, T.EVENT_NOTED, T.EVENTS_ACKNOWLEDGED, T.PORTS_RELEASED,
                T.VOLUME_UNUSED, T.MANAGED_REMOVED,
            }
        ),
        managed,
        restarts=True,
    ),
    "replaced": Journey(
        frozenset(
            {
                T.MANAGED_RESTARTING, T.MANAGED_SWITCHING, T.MANAGED_SWITCHED, T.MANAGED_REPLACING,
                T.MANAGED_BROUGHT_BACK, T.MANAGED_LOG_SEEN, T.PORTS_FREED, T.EXEC_INTENDED, T.EXEC_FORGOTTEN,
            }
        ),
        replaced,
    ),
    "fenced": Journey(frozenset({T.ATTEMPT_FENCED}), fenced),
    "given_up": Journey(frozenset({T.RUN_GIVEN_UP}), given_up, logs=False),
    "retold": Journey(frozenset({T.RUN_RETOLD}), retold, logs=False),
    "rebuilt": Journey(frozenset({T.DAMAGE_NOTED, T.REBUILT}), rebuilt),
    "log_flipped": Journey(frozenset({T.DAMAGE_NOTED, T.REBUILT}), partial(rebuilt, harm=damage.flip_in_log)),
    "log_removed": Journey(frozenset({T.DAMAGE_NOTED, T.REBUILT}), partial(rebuilt, harm=damage.remove_log)),
}  # fmt: skip
