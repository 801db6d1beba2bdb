"""docs/pipeline.md is the language: its examples load, and it leaves nothing out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider import _cel_lexer, _pipeline_reader, _yaml, expressions, pipeline
from outrider.pipeline import load_pipeline
from outrider.schema import pipeline_schema

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def keys(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for value in schema.values():
            yield from keys(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from keys(value)


@pytest.mark.parametrize("text", EXAMPLES)
def test_each_example_loads(text: str) -> None:
    assert load_pipeline(text).steps


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("key", sorted(set(keys(pipeline_schema({})))))
def test_each_key_is_described(key: str) -> None:
    assert re.search(rf"`[^`\n]*\b{re.escape(key)}\b[^`\n]*`", PAGE)


@pytest.mark.parametrize(
    "name", sorted({*expressions._BUILT_IN, *expressions.FUNCTIONS, *expressions.STATUS_FUNCTIONS, *expressions.ROOTS})
)
def test_each_function_and_name_of_expressions_is_described(name: str) -> None:
    assert re.search(rf"`{name}[`(.]", PAGE)


@pytest.mark.parametrize(
    "limit",
    [
        f"{_pipeline_reader.MAX_STEPS} at most",
        f"{_yaml.MAX_DEPTH} levels and {_yaml.MAX_NODES:,} values",
        f"{pipeline.MAX_TEXT_ARG:,} characters",
        f"{pipeline.MAX_ARGS_BYTES // 1024} KiB",
        f"{_cel_lexer.MAX_LENGTH:,} characters, {_cel_lexer.MAX_TOKENS} parts and {_cel_lexer.MAX_DEPTH} levels",
        f"of a pipeline {_pipeline_reader.MAX_EXPRESSION_TEXT // 1024} KiB",
        f"comes to {expressions.MAX_RESULT // 1024} KiB",
        f"{_pipeline_reader.MAX_RETRIES} times at most",
    ],
)
def test_limits_are_those_of_the_code(limit: str) -> None:
    assert limit in " ".join(PAGE.split())


def test_the_examples_of_the_repository_load() -> None:
    files = [file for file in (ROOT / "examples").rglob("*.yaml") if "steps:" in file.read_text(encoding="utf-8")]
    assert files
    for file in files:
        assert load_pipeline(file.read_bytes()).steps
