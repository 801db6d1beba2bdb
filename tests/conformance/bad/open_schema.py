"""Its parameters take whatever is given, so a misspelt one is never noticed."""

from pydantic import BaseModel, Field
from words import hook

from outrider.steps import ReadPath, WritePath


class OpenParams(BaseModel):
    of: ReadPath
    to: WritePath
    pause_s: float = Field(0, ge=0, le=60)


outrider_step_types = hook(params=OpenParams)
