"""What the plugin tells the core: schemas that refuse by themselves, and plans."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import jsonschema
import outrider_step_http as plugin
import pytest
from pydantic import BaseModel, ValidationError

from outrider.steps import StepContext

CONTEXT = StepContext(run_id="r1", step="fetch")
GOOD = {"url": "https://files.example.org/maps.tar.zst?v=1", "to": "/build/maps.tar.zst", "sha256": "ab" * 32}
UPLOAD = {"url": "http://[::1]:8080", "from": "/build/report.json", "headers": {"Content-Type": "text/plain"}}

BAD: list[tuple[str, type[BaseModel], dict[str, Any]]] = [
    ("no address", plugin.DownloadParams, {"to": "/x"}),
    ("no target", plugin.DownloadParams, {"url": "https://h/x"}),
    ("another scheme", plugin.DownloadParams, GOOD | {"url": "file:///etc/passwd"}),
    ("password in the address", plugin.DownloadParams, GOOD | {"url": "https://user:pass@host/x"}),
    ("fragment", plugin.DownloadParams, GOOD | {"url": "https://host/x#y"}),
    ("space in the address", plugin.DownloadParams, GOOD | {"url": "https://host/a b"}),
    ("no host", plugin.DownloadParams, GOOD | {"url": "https:///x"}),
    ("relative target", plugin.DownloadParams, GOOD | {"to": "x"}),
    ("short checksum", plugin.DownloadParams, GOOD | {"sha256": "ab"}),
    ("unknown parameter", plugin.DownloadParams, GOOD | {"method": "GET"}),
    ("credential as a header", plugin.DownloadParams, GOOD | {"headers": {"authoriZation": "x"}}),
    ("header of the step's own", plugin.DownloadParams, GOOD | {"headers": {"Range": "bytes=0-"}}),
    ("header with a line break", plugin.DownloadParams, GOOD | {"headers": {"X-A": "a\r\nHost: evil"}}),
    ("header with a bad name", plugin.DownloadParams, GOOD | {"headers": {"X A": "a"}}),
    ("header that is a number", plugin.DownloadParams, GOOD | {"headers": {"X-A": 1}}),
    ("no patience", plugin.DownloadParams, GOOD | {"idle_timeout_s": 0}),
    ("short SHA-512", plugin.DownloadParams, GOOD | {"sha512": "ab" * 32}),
    ("no connection", plugin.DownloadParams, GOOD | {"connections": 0}),
    ("hundreds of connections", plugin.DownloadParams, GOOD | {"connections": 200}),
    ("unknown digest", plugin.DownloadParams, GOOD | {"digests": ["md5"]}),
    ("hardly moving", plugin.DownloadParams, GOOD | {"limit_bytes_per_s": 10}),
    ("proxy with a password", plugin.DownloadParams, GOOD | {"proxy": "http://u:p@proxy:3128"}),
    ("proxy with a path", plugin.DownloadParams, GOOD | {"proxy": "http://proxy/x"}),
    ("another kind of proxy", plugin.DownloadParams, GOOD | {"proxy": "socks5://proxy:1080"}),
    ("credential in the step's own header", plugin.DownloadParams, GOOD | {"auth_header": "Host"}),
    ("credential in no header", plugin.DownloadParams, GOOD | {"auth_header": "X Key"}),
    ("relative authority", plugin.DownloadParams, GOOD | {"ca": "ca.pem"}),
    ("form by PUT", plugin.UploadParams, UPLOAD | {"method": "PUT", "form": {"file": "f"}}),
    ("form without a file", plugin.UploadParams, UPLOAD | {"form": {"fields": {"a": "b"}}}),
    ("form with a line break", plugin.UploadParams, UPLOAD | {"form": {"file": "f", "fields": {"a": "b\r\nc"}}}),
    ("form with a number", plugin.UploadParams, UPLOAD | {"form": {"file": "f", "fields": {"a": 1}}}),
    ("unknown method", plugin.UploadParams, UPLOAD | {"method": "DELETE"}),
    ("upload to a target", plugin.UploadParams, UPLOAD | {"to": "/x"}),
]


@pytest.mark.parametrize(("model", "params"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_schema_alone_refuses_what_the_model_refuses(model: type[BaseModel], params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(params)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(params, model.model_json_schema(by_alias=True))


MORE = {
    "sha512": "ab" * 64, "auth_header": "X-Api-Key", "proxy": "http://proxy.example:3128", "ca": "/build/ca.pem",
    "limit_bytes_per_s": 65536,
}  # fmt: skip
FORM = {"file": "upload", "filename": "a b", "content_type": "text/plain", "fields": {"kind": "größe", "empty": ""}}


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (plugin.DownloadParams, GOOD),
        (plugin.DownloadParams, GOOD | MORE | {"connections": 16, "digests": ["sha256", "sha512"]}),
        (plugin.UploadParams, UPLOAD),
        (plugin.UploadParams, UPLOAD | MORE | {"method": "POST", "form": FORM}),
        (plugin.UploadParams, UPLOAD | {"form": FORM}),
    ],
)
def test_model_and_schema_agree_on_what_is_right(model: type[BaseModel], params: dict[str, Any]) -> None:
    model.model_validate(params)
    jsonschema.validate(params, model.model_json_schema(by_alias=True))


def test_refused_address_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as refused:
        plugin.DownloadParams.model_validate(GOOD | {"url": "https://user:hunter2@host/x"})
    assert "hunter2" not in str(refused.value)


def test_plan_asks_for_egress_and_carries_the_parameters_by_their_names() -> None:
    types = {step_type.name: step_type for step_type in plugin.outrider_step_types()}
    plan = types["http.upload"].resolve(plugin.UploadParams.model_validate(UPLOAD), CONTEXT)
    assert (plan.image, plan.args, plan.network, plan.control) == (plugin.IMAGE, ("upload",), "egress", None)
    assert plan.inputs == UPLOAD | {"connect_timeout_s": 10, "idle_timeout_s": 60, "method": "PUT"}
    form = types["http.upload"].resolve(plugin.UploadParams.model_validate(UPLOAD | {"form": FORM}), CONTEXT)
    assert form.inputs is not None
    assert form.inputs["method"] == "POST"
    assert types["http.download"].idempotent
    assert not types["http.upload"].idempotent, "it may be a POST"


def test_paths_are_marked_for_the_core() -> None:
    assert plugin.DownloadParams.model_json_schema()["properties"]["to"]["x-outrider-path"] == "write"
    assert plugin.UploadParams.model_json_schema(by_alias=True)["properties"]["from"]["x-outrider-path"] == "read"


def test_plugin_is_found_by_its_entry_point() -> None:
    (found,) = entry_points(group="outrider.steps", name="http")
    assert found.load() is plugin
