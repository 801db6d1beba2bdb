"""The pipeline schema that a server gives: with the step types of all nodes, of a role's, or of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as tpb
from outrider.v1.control_service_pb2_grpc import ControlServiceStub
from tests.integration.server_rig import Rig, add_node, refused


def step_type(name: str, version: str, **properties: Any) -> tpb.StepTypeInfo:
    schema = {"type": "object", "additionalProperties": False, "properties": properties, "required": [*properties][:1]}
    return tpb.StepTypeInfo(
        name=name,
        distribution="outrider-step-test",
        version=version,
        description="Copies",
        params_schema_json=json.dumps(schema).encode(),
        envs=["TOKEN"],
    )


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


async def node(rig: Rig, name: str, *types: tpb.StepTypeInfo, role: str = "") -> None:
    """A node that reported these and went away again."""
    agent = await add_node(rig, name, role=role)
    agent.step_types = list(types)
    await agent.start()
    await agent.stop()


@pytest.fixture
async def fleet(rig: Rig, control: ControlServiceStub) -> None:
    lock = f"outrider==0.1.0 --hash=sha256:{'0' * 64}\n".encode()
    for name in ("game", "build", "empty"):
        role = tpb.NodeRole(name=name, agent=">=0.1", lock=lock)
        await control.SetNodeRole(pb.SetNodeRoleRequest(request_id=name, role=role), timeout=10)
    await node(rig, "n1", step_type("test.copy", "1.9", source=TEXT), step_type("test.only", "1.9"), role="game")
    await node(rig, "n2", step_type("test.copy", "1.10", source=TEXT, limit=NUMBER), role="build")
    await node(rig, "n3", step_type("test.copy", "1.10", source=TEXT, limit=NUMBER), role="build")


def problems(schema: dict[str, Any], **step: Any) -> list[str]:
    jsonschema.Draft7Validator.check_schema(schema)
    pipeline = {"name": "p", "steps": [{"name": "one", "uses": "test.copy", **step}]}
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(pipeline)]


async def get(control: ControlServiceStub, **request: str) -> dict[str, Any]:
    answer = await control.GetPipelineSchema(pb.GetPipelineSchemaRequest(**request), timeout=10)
    return dict(json.loads(answer.schema_json))


@pytest.mark.usefixtures("fleet")
async def test_what_fits_one_of_the_nodes_fits(control: ControlServiceStub) -> None:
    whole = await get(control)
    assert problems(whole, **{"with": {"source": "a", "limit": 1}}) == []
    assert problems(whole, **{"with": {"source": "a"}, "envs": {"TOKEN": "s.T"}}) == []
    assert problems(whole, **{"with": {"source": "a"}, "envs": ["s.TOKEN"]}) == []
    assert problems(whole, **{"with": {"source": "a", "more": 1}})
    assert problems(whole, **{"with": {"source": "a"}, "envs": {"TOEKN": "s.T"}})
    assert problems(whole, **{"with": {"source": "a"}, "envs": ["s.TOEKN"]})
    assert problems(whole)  # without the parameter that all of them want
    assert problems(whole, uses="test.other", **{"with": {}})
    newest = whole["definitions"]["test.copy"]["anyOf"][0]["$ref"].rpartition("/")[2]
    told = whole["definitions"][newest]["description"]
    assert told == "Copies (outrider-step-test 1.10, on n2, n3)"


@pytest.mark.usefixtures("fleet")
async def test_a_node_and_a_role_have_their_own(control: ControlServiceStub) -> None:
    for request, limited, only in (
        ({"node_id": "n1"}, False, True),
        ({"role": "game"}, False, True),
        ({"node_id": "n3"}, True, False),
        ({"role": "build"}, True, False),
    ):
        schema = await get(control, **request)
        assert (problems(schema, **{"with": {"source": "a", "limit": 1}}) == []) is limited
        assert (problems(schema, uses="test.only") == []) is only
    error = await refused(get(control, node_id="n9"))
    assert (error.code, error.hint) == ("unknown_node", "the nodes are n1, n2, n3")
    error = await refused(get(control, role="db"))
    assert (error.code, error.hint) == ("unknown_role", "nodes have the roles build, game")


async def test_env_sets_are_offered(rig: Rig, control: ControlServiceStub) -> None:
    await node(rig, "n1", step_type("test.copy", "1"))
    await control.SetEnvSet(
        pb.SetEnvSetRequest(request_id="e", name="builds", values={"A": "secret-value"}), timeout=10
    )
    schema = await get(control)
    assert "builds" in json.dumps(schema["properties"]["envs"])
    assert "secret-value" not in json.dumps(schema)


async def test_a_schema_of_a_strangers_that_is_none_spoils_nothing(rig: Rig, control: ControlServiceStub) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"properties": {"a": deep}, "$defs": {"b": deep and {}}}
    odd = step_type("test.odd", "1")
    odd.params_schema_json = json.dumps({"type": "object", "properties": [], "anyOf": 1, "required": "x"}).encode()
    nested = step_type("test.deep", "1")
    nested.params_schema_json = json.dumps(deep).encode()
    await node(rig, "n1", step_type("test.copy", "1", source=TEXT), odd, nested)
    schema = await get(control)
    assert problems(schema, **{"with": {"source": "a"}}) == []
    assert problems(schema, **{"with": {"more": "a"}})


async def test_without_nodes_there_are_no_step_types_and_nothing_is_wrong(control: ControlServiceStub) -> None:
    answer = await control.GetPipelineSchema(pb.GetPipelineSchemaRequest(), timeout=10)
    assert answer.nodes == 0
    assert problems(json.loads(answer.schema_json), uses="any.thing") == []


def test_the_example_pipelines_fit_the_schema_of_our_plugins() -> None:
    from outrider.schema import installed_step_types, pipeline_schema

    step_types, broken = installed_step_types()
    assert not broken
    schema = pipeline_schema(step_types, complete=True)
    files = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))
    assert files
    for file in files:
        document = yaml.safe_load(file.read_text())
        assert [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)] == [], file
