"""It takes a password within a parameter, where it stands in pipelines and plans just as well."""

from pydantic import BaseModel
from words import WordsParams, hook


class Login(BaseModel, extra="forbid"):
    user: str
    password: str


class LoginParams(WordsParams):
    login: Login | None = None


outrider_step_types = hook(params=LoginParams)
