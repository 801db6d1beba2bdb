"""The step types against the kit that every step plugin is tested with."""

from __future__ import annotations

import itertools
import time
from typing import Any

from outrider.testing import Attempted, Example, Failing, StepConformance, Wrong

IMAGE = "outrider/base:1"
NUMBERS = itertools.count()
ANSWERS = "echo up; trap 'exit 0' TERM; sleep 600 & wait"


def container(name: str, script: str = ANSWERS, **more: Any) -> dict[str, Any]:
    """A managed container with a script."""
    given = {"name": name, "image": IMAGE, "entrypoint": ["sh", "-c"], "args": [script], "network": "none"}
    return {**given, "restart": "no", **more}


def started(name: str, script: str = ANSWERS, **more: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    return (("container.start", container(name, script, ready={"log": "up"}, **more)),)


class TestStart(StepConformance):
    step_type = "container.start"
    plugin = "outrider_step_container"
    examples = (
        Example(
            "ready by its log",
            container("kit-start", ready={"log": "up", "timeout": "60s"}),
            outputs={"name": "kit-start", "adopted": False},
            varying=("adopted",),
            object="game/kit-start",
        ),
    )
    failing = (
        Failing(
            "ends before it is ready",
            container("kit-ends", "echo goodbye; exit 3", ready={"log": "up", "timeout": "30s"}),
            says="goodbye",
            object="game/kit-ends",
        ),
    )
    wrong = (
        Wrong("two probes", container("x", ready={"log": "up", "tcp": "http"}), says="exactly one"),
        Wrong("volume that the step has not", container("x", volumes={"saves": "/data"}), says="saves"),
        Wrong("unknown parameter", container("x", colour="red"), says="colour"),
    )
    long = Example(
        "slow to get ready",
        lambda _: container(f"kit-slow-{next(NUMBERS)}", f"sleep 12; {ANSWERS}", ready={"log": "up", "timeout": "60s"}),
        object="game/kit-slow",
    )
    grace_s = 5.0


class TestStop(StepConformance):
    step_type = "container.stop"
    plugin = "outrider_step_container"
    progress = False
    examples = (
        Example(
            "stopped and removed",
            {"name": "kit-stop", "remove": True, "missing_ok": True},
            before=started("kit-stop"),
            outputs={"name": "kit-stop", "state": "removed"},
            varying=("state", "exit_code"),
            object="game/kit-stop",
        ),
    )
    failing = (Failing("no such container", {"name": "kit-none"}, object="game/kit-none", says="kit-none"),)
    wrong = (Wrong("no name", {}, says="name"),)
    quick = "it is one call of the agent, which stops containers by itself"


def has_begun_twice(done: Attempted) -> None:
    begun, until = done.volumes["data"] / "begun", time.monotonic() + 10
    while begun.read_text() != "x\nx\n" and time.monotonic() < until:  # the engine does not wait for its first line
        time.sleep(0.05)
    assert begun.read_text() == "x\nx\n"


class TestRestart(StepConformance):
    step_type = "container.restart"
    plugin = "outrider_step_container"
    progress = False
    examples = (
        Example(
            "runs anew",
            {"name": "kit-restart", "grace": "5s"},
            volumes={"data": "/data:rw"},
            before=started("kit-restart", f"echo x >> /data/begun; {ANSWERS}", volumes={"data": "/data:rw"}),
            outputs={"name": "kit-restart", "state": "running"},
            check=has_begun_twice,
            object="game/kit-restart",
        ),
    )
    failing = (Failing("no such container", {"name": "kit-none"}, object="game/kit-none", says="kit-none"),)
    wrong = (
        Wrong("no name", {}, says="name"),
        Wrong("grace without a unit", {"name": "x", "grace": "soon"}, says="with.grace"),
    )
    quick = "it is one call of the agent, which restarts containers by itself"


class TestExec(StepConformance):
    step_type = "container.exec"
    plugin = "outrider_step_container"
    progress = False
    examples = (
        Example(
            "output is captured",
            {"name": "kit-exec", "args": ["sh", "-c", "echo $WORD"], "env": {"WORD": "hello"}, "capture": True},
            before=started("kit-exec"),
            outputs={"exit_code": 0, "stdout": "hello"},
            object="game/kit-exec",
        ),
    )
    failing = (
        Failing(
            "program fails",
            {"name": "kit-exec-3", "args": ["sh", "-c", "exit 3"]},
            before=started("kit-exec-3"),
            says="3",
            object="game/kit-exec",
        ),
        Failing(
            "program takes too long",
            {"name": "kit-exec-slow", "args": ["sleep", "60"], "timeout": "500ms"},
            before=started("kit-exec-slow"),
            code="exec_timeout",
            object="game/kit-exec",
        ),
    )
    wrong = (Wrong("no program", {"name": "x", "args": []}, says="args"),)
    quick = "the program runs in the container and not in the step"


class TestWait(StepConformance):
    step_type = "container.wait"
    plugin = "outrider_step_container"
    progress = False
    examples = (
        Example(
            "ended",
            {"name": "kit-wait", "ok": [7]},
            before=started("kit-wait", "echo up; exit 7"),
            outputs={"exit_code": 7},
            object="game/kit-wait",
        ),
    )
    failing = (
        Failing(
            "not with that code",
            {"name": "kit-wait-7"},
            before=started("kit-wait-7", "echo up; exit 7"),
            says="7",
            object="game/kit-wait",
        ),
    )
    wrong = (Wrong("no name", {}, says="name"),)
    quick = "it asks the agent, and waits for the answer"


def has_the_log(done: Attempted) -> None:
    assert (done.volumes["out"] / "log").read_bytes() == b"up\n"


class TestLogs(StepConformance):
    step_type = "container.logs"
    plugin = "outrider_step_container"
    progress = False
    examples = (
        Example(
            "all of it",
            {"name": "kit-logs", "to": "/out/log"},
            volumes={"out": "/out:rw"},
            before=started("kit-logs"),
            outputs={"path": "/out/log", "size_bytes": 3},
            check=has_the_log,
            object="game/kit-logs",
        ),
    )
    failing = (
        Failing(
            "no such container",
            {"name": "kit-none", "to": "/out/log"},
            volumes={"out": "/out:rw"},
            says="kit-none",
            object="game/kit-none",
        ),
    )
    wrong = (Wrong("nowhere", {"name": "x", "to": "/out/log"}, says="below no volume"),)
    quick = "a log of a few bytes is read"


class TestRun(StepConformance):
    step_type = "container.run"
    plugin = "outrider_step_container"
    progress = False
    examples = (
        Example(
            "outputs of its own",
            {"image": IMAGE, "args": ["sh", "-c", 'echo \'{"word": "hello"}\' >> /outrider/outputs']},
            outputs={"word": "hello"},
        ),
    )
    failing = (
        Failing(
            "its own words",
            {
                "image": IMAGE,
                "args": ["sh", "-c", 'echo \'{"error": "it rains", "code": "rain"}\' >> /outrider/progress; exit 75'],
            },
            code="rain",
            says="it rains",
            temporary=True,
        ),
    )
    wrong = (Wrong("no image", {"args": ["true"]}, says="image"),)
    long = Example("sleeps", {"image": IMAGE, "args": ["sh", "-c", "echo begun; sleep 30"]})
    until = "begun"
