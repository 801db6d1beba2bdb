"""What pydantic finds wrong with a configuration, in words for the person who wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import BaseModel, ValidationError

from outrider._suggest import did_you_mean
from outrider.errors import Problem

_PLAIN = {
    "missing": "is missing",
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping",
}


def problems_of(
    error: ValidationError, model: type[BaseModel], source: Callable[[str], str] = lambda _: ""
) -> Iterator[Problem]:
    """Each of them. ``source`` says where the value of a setting came from, "" if that needs no word."""
    for item in error.errors(include_url=False, include_input=False):
        path = ".".join(str(part) for part in item["loc"])
        hint = ""
        if item["type"] == "extra_forbidden":
            message = "there is no such setting"
            if len(item["loc"]) == 1:
                hint = did_you_mean(path, model.model_fields)
        else:
            message = _PLAIN.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        came = source(str(item["loc"][0])) if item["loc"] and item["type"] != "missing" else ""
        yield Problem(message, path=path, hint="; ".join(each for each in (hint, came and f"from {came}") if each))
