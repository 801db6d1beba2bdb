"""The plugin: its parameters and plans."""

from __future__ import annotations

import outrider_step_archive as plugin
import pytest
from pydantic import ValidationError

from outrider.steps import StepContext

CONTEXT = StepContext(run_id="r1", step="unpack")


def test_the_plans_ask_for_no_network_and_carry_all_parameters() -> None:
    for step_type, command in zip(plugin.outrider_step_types(), ("extract", "create"), strict=True):
        params = step_type.params.model_validate({"from": "/build/a.7z", "to": "/saves/a.7z"})
        plan = step_type.resolve(params, CONTEXT)
        assert (plan.network, plan.args, plan.control) == ("none", (command,), None)
        assert plan.inputs is not None
        assert plan.inputs["from"] == "/build/a.7z"
        assert step_type.idempotent


def test_the_schema_says_what_is_read_and_written() -> None:
    schema = plugin.ExtractParams.model_json_schema(by_alias=True)
    assert schema["properties"]["from"]["x-outrider-path"] == "read"
    assert schema["properties"]["to"]["x-outrider-path"] == "write"
    assert schema["required"] == ["from", "to"]


@pytest.mark.parametrize(("text", "size"), [("5GiB", 5 * 2**30), ("1.5MB", 1_500_000), ("7", 7), (12, 12)])
def test_sizes(text: object, size: int) -> None:
    params = plugin.ExtractParams.model_validate({"from": "/a", "to": "/b", "max_bytes": text})
    assert params.max_bytes == size


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"from": "a", "to": "/b"}, "from"),
        ({"from": "/a", "to": "/b", "existing": "overwrite"}, "existing"),
        ({"from": "/a", "to": "/b", "max_bytes": "5 apples"}, "is not a size"),
        ({"from": "/a", "to": "/b", "target": "/c"}, "target"),
    ],
)
def test_wrong_parameters_of_extract_are_named(params: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        plugin.ExtractParams.model_validate(params)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"from": "/a", "to": "/b.rar"}, "does not tell the format"),
        ({"from": "/a", "to": "/b.zip", "level": 12}, "the levels of zip are 0 to 9"),
    ],
)
def test_wrong_parameters_of_create_are_named(params: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        plugin.CreateParams.model_validate(params)


def test_create_tells_the_format_from_the_name() -> None:
    assert plugin.format_of("/x/Backup.TAR.ZST") == "tar.zst"
    assert plugin.format_of("/x/a.tgz") == "tar.gz"
    assert plugin.format_of("/x/a") is None
