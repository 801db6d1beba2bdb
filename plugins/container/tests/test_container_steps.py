from __future__ import annotations

from typing import Any

import outrider_step_container as plugin
import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from agent_core.container_spec import ManagedSpec
from outrider.steps import StepContext, StepPlan

TYPES = {step_type.name: step_type for step_type in plugin.outrider_step_types()}
CONTEXT = StepContext(run_id="r1", step="s")


def plan(name: str, params: dict[str, Any]) -> StepPlan:
    return TYPES[name].resolve(TYPES[name].params.model_validate(params), CONTEXT)


START = {
    "name": "arena-1",
    "image": "game/arena:7",
    "ports": [{"name": "game", "container": 27960, "protocol": "udp"}, {"name": "http", "container": 8080}],
    "env": {"SV_PORT": "$(ports.game)"},
    "ready": {"http": {"port": "http", "path": "/healthz"}, "timeout": "90s"},
    "volumes": {"saves": "/data:rw"},
    "resources": {"memory": "512MiB", "cpus": 1.5},
    "stop_signal": "SIGUSR1",
    "stop_grace": "2m",
    "tmp": "16MiB",
}


def test_start_asks_for_control_and_says_what_the_agent_understands() -> None:
    made = plan("container.start", START)
    assert (made.control, made.args, made.network) == ("containers", ("start",), "none")
    assert made.inputs is not None
    request = dict(made.inputs["request"])
    assert request.pop("replace") == "no"
    spec = ManagedSpec.parse(request)  # the agent's own model takes it
    assert spec.ready is not None
    assert spec.ready.timeout_s == 90
    assert spec.resources.memory_bytes == 512 * 1024**2
    assert (spec.stop_signal, spec.stop_grace_s, spec.tmp_size_bytes) == ("SIGUSR1", 120, 16 * 1024**2)


@pytest.mark.parametrize("tcp", ["http", {"port": "http"}])
def test_probe_by_connection_is_written_either_way(tcp: Any) -> None:
    made = plan("container.start", START | {"ready": {"tcp": tcp}})
    Draft202012Validator(TYPES["container.start"].params.model_json_schema()).validate(
        START | {"ready": {"tcp": tcp}}  # all that the server has
    )
    assert made.inputs is not None
    assert made.inputs["request"]["ready"] == {"tcp": {"port": "http"}, "timeout_s": 30.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"ready": {"timeout": "5s"}},
        {"ready": {"log": "x", "tcp": "http"}},
        {"ready": {"log": "x", "timeout": "soon"}},
        {"resources": {"memory": "much"}},
        {"ports": [{"container": 80}]},
        {"ports": [{"name": "x", "container": 70000}]},
        {"privileged": True},
        {"env_from": ["not-a-name"]},
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        plan("container.start", START | wrong)


def test_run_is_the_image_itself() -> None:
    made = plan("container.run", {"image": "tool:1", "args": ["-v"], "env": {"A": "b"}, "network": "egress"})
    assert (made.image, made.args, made.control, made.network) == ("tool:1", ("-v",), None, "egress")
    assert made.env == {"A": "b"}


def test_volumes_are_marked_for_the_server_to_check() -> None:
    schema = TYPES["container.start"].params.model_json_schema()
    assert schema["properties"]["volumes"]["x-outrider-volumes"] is True


def test_only_what_does_no_harm_twice_is_idempotent() -> None:
    assert {name: step_type.idempotent for name, step_type in TYPES.items()} == {
        "container.start": True,
        "container.stop": True,
        "container.restart": False,
        "container.exec": False,
        "container.wait": True,
        "container.logs": True,
        "container.run": False,
    }
