"""Configuration: one YAML file, environment variables and flags, into one typed object.

Flags win over the environment, the environment over the file, the file over defaults. Which one a value
came from is kept, so that `outrider agent config` can say so. No other module reads the environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from outrider._model_errors import problems_of
from outrider._yaml import read_document
from outrider.errors import InvalidInput

M = TypeVar("M", bound=BaseModel)


class Loaded(Generic[M]):
    """A configuration and, by field name, where each value came from: "default", "env NAME", "flag", or the file."""

    def __init__(self, value: M, sources: Mapping[str, str]) -> None:
        self.value = value
        self.sources = dict(sources)


def load(
    model: type[M],
    *,
    env_prefix: str,
    environ: Mapping[str, str],
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Loaded[M]:
    """Read ``model`` from ``file`` (YAML mapping), ``environ`` (``env_prefix`` + FIELD) and ``flags`` (None: not set).

    Values of list and mapping fields are JSON in the environment. Raises InvalidInput with every problem.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(model.model_fields, "default")
    if file is not None:
        for name, value in _read_file(file).items():
            values[name], sources[name] = value, str(file)
    for name in model.model_fields:
        variable = env_prefix + name.upper()
        if variable in environ:
            values[name], sources[name] = _from_env(environ[variable]), f"env {variable}"
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], sources[name] = value, "flag"
    try:
        return Loaded(model.model_validate(values), sources)
    except ValidationError as error:
        problems = list(problems_of(error, model, lambda name: sources.get(name, "")))
        raise InvalidInput(f"the configuration is not valid: {'; '.join(map(str, problems))}", problems) from error


def _read_file(file: Path) -> dict[str, Any]:
    what = f"the configuration file {file}"
    try:
        document = read_document(file, what)
    except FileNotFoundError as error:
        raise InvalidInput(f"{what} does not exist", code="file_missing") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InvalidInput(f"{what} must be a mapping of settings to values")
    return document


def _from_env(text: str) -> Any:
    if text[:1] in "[{":
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text
