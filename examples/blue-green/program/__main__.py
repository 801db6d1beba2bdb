"""Blue or green: whichever is idle gets the new version, is proven, and takes over."""

from __future__ import annotations

from typing import Any

from outrider_stepkit import Step, StepFailure, main
from outrider_stepkit.control import ControlClient

COLOURS = ("blue", "green")


def deploy(step: Step) -> None:
    """Start the idle colour; stop the other one once the new one has passed its check."""
    params, client = step.params, step.control()
    running = _running(client, params["name"])
    # Both are there where a former attempt died between the two ends of this: the younger is the one it made.
    old = running[0] if running else COLOURS[1]
    new = COLOURS[1 - COLOURS.index(old)]
    name = f"{params['name']}-{new}"
    spec = {
        "name": name,
        "image": params["image"],
        "args": params["args"],
        "env": params["env"],
        "volumes": params["volumes"],
        "ports": [{"name": "main", "container": params["port"]}],
        "ready": {"tcp": {"port": "main"}, "timeout_s": 60},
        "live": {"tcp": {"port": "main"}},
        "replace": "stop-first",  # what is left of an older version under this colour
    }
    step.progress(0, 3, unit="stages", message=f"starting {name}", force=True)
    started = client.start(spec)
    step.progress(1, 3, unit="stages", message=f"checking {name}", force=True)
    proof = client.exec(name, params["check"], timeout_s=60)
    if proof["exit_code"] != 0:
        client.remove(name, force=True)
        raise StepFailure(
            f"{name} does not pass its check ({params['check'][0]} ended with {proof['exit_code']}); "
            f"{'nothing' if not running else params['name'] + '-' + old} goes on",
            code="check_failed",
        )
    # From here on players go to the new one: whoever reads these outputs sends them there.
    step.output(colour=new, container=name, address=started["address"], port=started["ports"]["main"])
    step.progress(2, 3, unit="stages", message="stopping the other one", force=True)
    if running:
        client.stop(f"{params['name']}-{old}", grace_s=30)
        client.remove(f"{params['name']}-{old}")
    step.progress(3, 3, unit="stages", message=f"{name} serves")
    print(f"{name} serves on {started['address']}:{started['ports']['main']}")


def _running(client: ControlClient, name: str) -> list[str]:
    """The colours that run, the oldest first."""
    found: dict[str, dict[str, Any]] = {each["name"]: each for each in client.list()["containers"]}
    there = [colour for colour in COLOURS if found.get(f"{name}-{colour}", {}).get("state") == "running"]
    return sorted(there, key=lambda colour: str(client.inspect(f"{name}-{colour}")["started_at"]))


if __name__ == "__main__":
    main({"deploy": deploy})
