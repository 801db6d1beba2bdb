"""The JSON Schema of its parameters is none: examples are a list."""

from pydantic import Field
from words import WordsParams, hook


class InvalidParams(WordsParams):
    pause_s: float = Field(0, ge=0, le=60, json_schema_extra={"examples": "0.5"})


outrider_step_types = hook(params=InvalidParams)
