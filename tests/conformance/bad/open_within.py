"""One of its parameters takes whatever is given, so a misspelt key in it is never noticed."""

from pydantic import BaseModel
from words import WordsParams, hook


class Options(BaseModel):
    lower_case: bool = False


class OpenWithinParams(WordsParams):
    options: Options = Options()


outrider_step_types = hook(params=OpenWithinParams)
