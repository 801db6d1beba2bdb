"""What the plugin tells the core: schemas that refuse by themselves, and plans."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import jsonschema
import outrider_step_s3 as plugin
import pytest
from pydantic import BaseModel, ValidationError

from outrider.steps import StepContext

CONTEXT = StepContext(run_id="r1", step="fetch")
GOOD = {"bucket": "builds", "key": "arena/1.7z", "to": "/build/arena.7z", "sha256": "ab" * 32}
UPLOAD = {"bucket": "builds", "prefix": "arena", "from": "/saves"}

BAD: list[tuple[str, type[BaseModel], dict[str, Any]]] = [
    ("neither key nor prefix", plugin.DownloadParams, {"bucket": "b", "to": "/x"}),
    ("both", plugin.DownloadParams, GOOD | {"prefix": "arena"}),
    ("unknown parameter", plugin.DownloadParams, GOOD | {"keys": "x"}),
    ("relative target", plugin.DownloadParams, GOOD | {"to": "build/x"}),
    ("no target", plugin.DownloadParams, {"bucket": "b", "key": "k"}),
    ("short checksum", plugin.DownloadParams, GOOD | {"sha256": "abcd"}),
    ("empty key", plugin.DownloadParams, GOOD | {"key": ""}),
    ("key that climbs", plugin.DownloadParams, GOOD | {"key": "a/../b"}),
    ("key that is a folder", plugin.DownloadParams, GOOD | {"key": "a/"}),
    ("key with a line break", plugin.DownloadParams, GOOD | {"key": "a\nb"}),
    ("prefix that climbs", plugin.UploadParams, UPLOAD | {"prefix": ".."}),
    ("bucket with a slash", plugin.DownloadParams, GOOD | {"bucket": "a/b"}),
    ("endpoint with a password", plugin.DownloadParams, GOOD | {"endpoint": "https://user:pass@host"}),
    ("endpoint without a scheme", plugin.DownloadParams, GOOD | {"endpoint": "host:9000"}),
    ("no patience", plugin.DownloadParams, GOOD | {"idle_timeout_s": 0}),
    ("upload to a target", plugin.UploadParams, UPLOAD | {"to": "/x"}),
    ("a key that is not listed", plugin.UploadParams, {"bucket": "b", "key": "k", "from": "/x", "if_unchanged": True}),
    ("upload from nowhere", plugin.UploadParams, {"bucket": "b", "key": "k"}),
]


@pytest.mark.parametrize(("model", "params"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_schema_alone_refuses_what_the_model_refuses(model: type[BaseModel], params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(params)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(params, model.model_json_schema(by_alias=True))


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (plugin.DownloadParams, GOOD),
        (plugin.DownloadParams, {"bucket": "b", "prefix": "", "to": "/x"}),
        (
            plugin.DownloadParams,
            GOOD | {"key": "..hidden/a..b/ü", "endpoint": "http://[::1]:9000/s3", "region": "eu-1"},
        ),
        (plugin.UploadParams, UPLOAD | {"if_unchanged": True, "only_differences": False}),
        (plugin.UploadParams, UPLOAD),
    ],
)
def test_model_and_schema_agree_on_what_is_right(model: type[BaseModel], params: dict[str, Any]) -> None:
    model.model_validate(params)
    jsonschema.validate(params, model.model_json_schema(by_alias=True))


def test_plan_asks_for_egress_and_carries_the_parameters_by_their_names() -> None:
    types = {step_type.name: step_type for step_type in plugin.outrider_step_types()}
    plan = types["s3.upload"].resolve(plugin.UploadParams.model_validate(UPLOAD), CONTEXT)
    assert (plan.image, plan.args, plan.network, plan.control) == (plugin.IMAGE, ("upload",), "egress", None)
    assert plan.inputs is not None
    assert {name: plan.inputs[name] for name in UPLOAD} == UPLOAD
    assert "from_" not in plan.inputs
    assert types["s3.download"].idempotent
    assert types["s3.upload"].idempotent


def test_paths_are_marked_for_the_core() -> None:
    assert plugin.DownloadParams.model_json_schema()["properties"]["to"]["x-outrider-path"] == "write"
    assert plugin.UploadParams.model_json_schema(by_alias=True)["properties"]["from"]["x-outrider-path"] == "read"


def test_plugin_is_found_by_its_entry_point() -> None:
    (found,) = entry_points(group="outrider.steps", name="s3")
    assert found.load() is plugin
