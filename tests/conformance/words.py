"""A step type that keeps every promise, and the means to make one that breaks a single one of them.

Its program is a few lines of Python given to the base image, so no image has to be built for these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field

from outrider.steps import ReadPath, StepContext, StepPlan, StepType, WritePath, hookimpl

IMAGE = "outrider/base:1"

PROGRAM = """
import json, os, signal, sys, time

def tell(file, **values):
    with open("/outrider/" + file, "a") as lines:
        lines.write(json.dumps(values) + "\\n")

def stop(*_):
    raise SystemExit(143)

signal.signal(signal.SIGTERM, stop)
params = json.load(open("/outrider/inputs.json"))
if not os.path.isfile(params["of"]):
    tell("progress", error=params["of"] + " is no file", code="no_file")
    sys.exit(1)
words = open(params["of"]).read().split()
staged = params["to"] + ".part"
try:
    with open(staged, "w") as out:
        for number, word in enumerate(words, 1):
            out.write(word + "\\n")
            tell("progress", done=number, total=len(words), unit="words")
            time.sleep(params["pause_s"])
    os.replace(staged, params["to"])
finally:
    if os.path.exists(staged):
        os.remove(staged)
tell("outputs", words=len(words))
"""


class WordsParams(BaseModel, extra="forbid"):
    of: ReadPath
    to: WritePath
    pause_s: float = Field(0, ge=0, le=60)


class WordsOutputs(BaseModel, extra="forbid"):
    words: int


def resolve(params: WordsParams, _context: StepContext) -> StepPlan:
    return plan()


def plan(program: str = PROGRAM, image: str = IMAGE, args: tuple[str, ...] = ()) -> StepPlan:
    return StepPlan(image=image, entrypoint=("python3", "-c"), args=(program, *args))


def step_type(**changes: Any) -> StepType:
    """The step type, with some of it changed."""
    given: dict[str, Any] = {
        "name": "words.split",
        "params": WordsParams,
        "outputs": WordsOutputs,
        "resolve": resolve,
        "envs": ["WORDS_TOKEN"],
        "idempotent": True,
    }
    return StepType(**given | changes)


def hook(**changes: Any) -> Callable[[], list[StepType]]:
    """The hook of a plugin with that step type, as its module has to have it."""

    @hookimpl
    def outrider_step_types() -> list[StepType]:
        return [step_type(**changes)]

    return outrider_step_types


def program(*changes: tuple[str, str]) -> Callable[[Any, StepContext], StepPlan]:
    """A resolve whose program differs by these replacements; each must be one."""
    text = PROGRAM
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} stands {text.count(old)} times in the program")
        text = text.replace(old, new)
    return lambda _params, _context: plan(text)


outrider_step_types = hook()
