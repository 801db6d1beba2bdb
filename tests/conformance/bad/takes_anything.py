"""Its parameters are any texts: a path that is none reaches the program."""

from pydantic import BaseModel, Field
from words import hook

from outrider.steps import WritePath


class AnyParams(BaseModel, extra="forbid"):
    of: str
    to: WritePath
    pause_s: float = Field(0, ge=0, le=60)


outrider_step_types = hook(params=AnyParams)
