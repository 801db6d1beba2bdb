"""It takes a password as a parameter, which stands in every pipeline, plan and journal."""

from words import WordsParams, hook


class PasswordParams(WordsParams):
    password: str = ""


outrider_step_types = hook(params=PasswordParams)
