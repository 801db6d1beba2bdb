"""Starts, stops, restarts and looks after managed containers through the control socket of the attempt.

Every call of that may be repeated, and is, for as long as the agent does not answer: it may be restarting. How long
that may take is for the step's timeout to say.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from outrider_stepkit import Step, StepFailure, main, staged_file
from outrider_stepkit.control import ControlClient, ControlError

_PATIENCE_S = 600.0  # beyond what a grace may take
_AGAIN_S = 1.0
_TIMEOUTS = (504, 0)  # the engine did not answer in time, or the agent did not
_CAPTURED = 16 * 1024
_ENV = re.compile(r"\$\$\(|\$\(envs\.([A-Za-z_][A-Za-z0-9_]*)\)")
_STARTED = ("id", "name", "image", "ports", "address", "host_paths", "adopted", "replaced")


def start(step: Step) -> None:
    """Ask for the container; give its ports back to the pipeline."""
    request = dict(step.params["request"])
    values = {name: _data(step.secret(name)) for name in step.params["env_from"]}
    request["env"] = {**request["env"], **values}
    request["files"] = {path: _file(step, file) for path, file in step.params["files"].items()}
    name, image = request["name"], request["image"]
    step.progress(0, None, message=f"starting {name} from {image}")

    def pulled(done: int, total: int | None, message: str) -> None:
        step.progress(done, total, message=message)

    answer = _client(step).start(request, on_pull=pulled)
    step.output(**{key: answer[key] for key in _STARTED})
    places = ", ".join(f"{name} {answer['address']}:{port}" for name, port in answer["ports"].items())
    how = "runs already" if answer["adopted"] else "has taken the former's place" if answer["replaced"] else "is ready"
    print(f"{answer['name']} {how}{f': {places}' if places else ''}")


def stop(step: Step) -> None:
    """Stop the container, and remove it if that is wanted."""
    name, client = step.params["name"], _client(step)
    try:
        answer = client.call("POST", f"/v1/containers/{name}/stop", _grace(step), timeout_s=_patience(step))
        state = {key: answer[key] for key in ("name", "state", "exit_code")}
        if step.params["remove"]:
            client.remove(name, force=True)
            state["state"] = "removed"
    except ControlError as error:
        if error.status != 404 or not step.params["missing_ok"]:
            raise
        state = {"name": name, "state": "missing", "exit_code": None}
    step.output(**state)
    print(f"{name}: {state['state']}")


def restart(step: Step) -> None:
    """Restart the container in place."""
    name = step.params["name"]
    path = f"/v1/containers/{name}/restart"
    try:
        answer = _client(step).call("POST", path, _grace(step), timeout_s=_patience(step))
    except ControlError as error:
        if error.status in _TIMEOUTS and error.temporary:
            raise StepFailure(f"{error}; whether {name} was restarted is not known", code=error.code) from error
        raise
    step.output(**{key: answer[key] for key in ("name", "state", "exit_code", "ports")})
    print(f"{name} was restarted")


def execute(step: Step) -> None:
    """Run a program inside the container; what it prints is this step's output."""
    params = step.params
    env = {**params["env"], **{name: step.secret(name) for name in params["env_from"]}}
    options = {"env": env, "timeout_s": params["timeout"], "id": "step"}
    options.update({key: params[key] for key in ("workdir", "user") if params[key] is not None})
    printed: list[str] = []
    kept = 0

    def heard(stream: str, text: str) -> None:
        nonlocal kept
        print(text, end="", flush=True, file=sys.stdout if stream == "stdout" else sys.stderr)
        if stream == "stdout" and params["capture"] and kept <= _CAPTURED:
            printed.append(text)
            kept += len(text.encode("utf-8", "replace"))

    step.progress(0, None, unit="programs", message=f"running {params['args'][0]} in {params['name']}")
    client = _client(step)
    end = _looked_up(lambda: client.exec(params["name"], params["args"], on_output=heard, **options))
    if end["exit_code"] not in params["ok"]:
        raise StepFailure(
            f"{params['args'][0]} in the container {params['name']} ended with exit code {end['exit_code']}",
            code="exec_failed",
        )
    if params["capture"] and end["truncated"]:
        raise StepFailure(
            f"a part of what {params['args'][0]} printed is lost, because the agent was restarted meanwhile",
            code="output_lost",
        )
    if kept > _CAPTURED:
        raise StepFailure(
            f"{params['args'][0]} printed more than the {_CAPTURED // 1024} KiB that an output may have",
            code="output_too_long",
        )
    step.output(exit_code=end["exit_code"], stdout="".join(printed).removesuffix("\n"))


def _looked_up(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer, asked for again while the agent can't tell (its engine is away, or does not answer).

    By this attempt, because its id is known: the next attempt's is another one, with which the program would be run
    a second time.
    """
    while True:
        try:
            return ask()
        except ControlError as error:
            if not error.temporary:
                raise
            print(f"asking again how it went: {error}", file=sys.stderr)
            time.sleep(_AGAIN_S)


def wait(step: Step) -> None:
    """Wait for the container's end."""
    name, ok = step.params["name"], step.params["ok"]
    step.progress(0, None, unit="containers", message=f"waiting for the end of {name}")
    end = _client(step).wait(name, timeout_s=step.params["timeout"])
    if end["engine_stopped"]:
        raise StepFailure(
            f"the container engine was restarted under {name}: how it would have ended is not known",
            code="engine_stopped",
            temporary=True,
        )
    if ok is not None and end["exit_code"] not in ok:
        why = "was killed for want of memory" if end["oom_killed"] else f"ended with exit code {end['exit_code']}"
        raise StepFailure(f"the container {name} {why}", code="container_failed")
    step.output(exit_code=end["exit_code"], oom_killed=end["oom_killed"])
    print(f"{name} ended with exit code {end['exit_code']}")


def logs(step: Step) -> None:
    """Write the container's log to a file, whole or not at all."""
    params, client = step.params, _client(step)
    while True:
        try:
            size, digest = _write_log(step, client)
            break
        except ControlError as error:
            if error.code != "control_unavailable":
                raise
            print(f"reading the log again from its beginning: {error}")
            time.sleep(1)
    step.progress(size, size, message=params["to"])
    step.output(path=params["to"], size_bytes=size, sha256=digest)
    print(f"{params['to']}: {size} bytes")


def _write_log(step: Step, client: ControlClient) -> tuple[int, str]:
    params, begun = step.params, time.monotonic()
    digest, size = hashlib.sha256(), 0
    with staged_file(params["to"]) as file:
        for piece in _pieces(client, params):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            step.progress(size, None, message=f"log of {params['name']}, {_rate(size, begun)}")
    return size, digest.hexdigest()


def _pieces(client: ControlClient, params: dict[str, Any]) -> Iterator[bytes]:
    if params["tail"] is not None:
        yield client.logs(params["name"], tail=params["tail"])
    else:
        yield from client.all_logs(params["name"], follow=params["follow"])


def _file(step: Step, file: dict[str, Any]) -> dict[str, Any]:
    """A file of the start call: the values of envs are put in here, and are data from then on."""
    if file["env"] is not None:
        text = _data(step.secret(file["env"]))
    else:
        text = _ENV.sub(lambda match: "$$(" if match[1] is None else _data(step.secret(match[1])), file["text"])
    return {"text": text, "executable": file["executable"]}


def _data(value: str) -> str:
    return value.replace("$(", "$$(")


def _client(step: Step) -> ControlClient:
    return step.control(patience_s=math.inf)


def _grace(step: Step) -> dict[str, Any]:
    grace_s = step.params["grace"]
    return {} if grace_s is None else {"grace_s": grace_s}


def _patience(step: Step) -> float:
    return _PATIENCE_S + (step.params["grace"] or 0)


def _rate(size: int, begun: float) -> str:
    return f"{size / max(time.monotonic() - begun, 0.001) / 1024**2:.1f} MiB/s"


if __name__ == "__main__":
    main({"start": start, "stop": stop, "restart": restart, "exec": execute, "wait": wait, "logs": logs})
