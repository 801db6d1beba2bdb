"""Starts, stops and restarts managed containers through the control socket of the attempt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from outrider_stepkit import Step, main
from outrider_stepkit.control import ControlClient, ControlError

_PATIENCE_S = 600.0  # for an image to be pulled, beyond what readiness or the grace may take
_LONGEST_WAIT_S = 5.0


def start(step: Step) -> None:
    """Ask for the container; give its ports back to the pipeline."""
    request = dict(step.params["request"])
    request["env"] = {
        **request["env"],
        **{name: step.secret(name).replace("$(", "$$(") for name in step.params["env_from"]},
    }
    patience_s = _PATIENCE_S + (request.get("ready") or {}).get("timeout_s", 0)
    step.progress(0, None, unit="containers", message=f"starting {request['name']} from {request['image']}")
    answer = _ask(step, "POST", "/v1/containers", request, patience_s)
    step.output(**answer)
    places = ", ".join(f"{name} {answer['address']}:{port}" for name, port in answer["ports"].items())
    how = "runs already" if answer["adopted"] else "is started and ready"
    print(f"{answer['name']} {how}{f': {places}' if places else ''}")


def stop(step: Step) -> None:
    """Stop the container, and remove it if that is wanted."""
    name = step.params["name"]
    try:
        answer = _ask(step, "POST", f"/v1/containers/{name}/stop", _grace(step), _patience(step))
        state = {key: answer[key] for key in ("name", "state", "exit_code")}
        if step.params["remove"]:
            _ask(step, "DELETE", f"/v1/containers/{name}?force=1", None, _patience(step))
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
    answer = _ask(step, "POST", f"/v1/containers/{name}/restart", _grace(step), _patience(step))
    step.output(**{key: answer[key] for key in ("name", "state", "exit_code", "ports")})
    print(f"{name} was restarted")


def _ask(step: Step, method: str, path: str, body: Mapping[str, Any] | None, patience_s: float) -> dict[str, Any]:
    """One call, repeated for as long as the agent does not answer: it may be restarting, and every call may be
    repeated. How long that may take is for the step's timeout to say."""
    client: ControlClient = step.control()
    wait_s = 0.1
    while True:
        try:
            return client.call(method, path, body, timeout_s=patience_s)
        except ControlError as error:
            if error.code != "control_unavailable":
                raise
            print(f"waiting for the agent: {error}")
            time.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)


def _grace(step: Step) -> dict[str, Any]:
    grace_s = step.params["grace"]
    return {} if grace_s is None else {"grace_s": grace_s}


def _patience(step: Step) -> float:
    return _PATIENCE_S + (step.params["grace"] or 0)


if __name__ == "__main__":
    main({"start": start, "stop": stop, "restart": restart})
