"""The JSON Schema of its parameters takes less than their model, so that the node refuses what its author tried."""

from pydantic import Field
from words import WordsParams, hook

from outrider.steps import ReadPath


class ShortParams(WordsParams):
    of: ReadPath = Field(json_schema_extra={"maxLength": 5})


outrider_step_types = hook(params=ShortParams)
