"""What the checks of the kit look at: each function gives sentences about what is wrong, none if nothing is."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError

from agent_core.onestep import GivenVolume, StepRequest, plan_step
from agent_core.planning import PlannedStep
from agent_core.plugins import PluginError, PluginHost, RegisteredStepType
from agent_core.policy import NodePolicy
from outrider.errors import InvalidInput, OutriderError
from outrider.masking import contains_secret
from outrider.schema import marked_values
from outrider.steps import NoOutputs, StepContext, StepPlan, StepType
from outrider.testing import _isolated
from outrider.testing._isolated import context_as_json
from outrider.testing._purity import watched
from outrider.testing._schemas import open_objects, secrets

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_CRASH = re.compile(r"^(\w+\.)*\w*(Error|Exception)\b|Traceback|<class '|object at 0x")
# A name of an image: the grammar of references (distribution/reference), with a tag or a digest demanded.
_REFERENCE = re.compile(
    r"(?P<name>[a-z0-9]+([._:-][a-z0-9]+)*(/[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*)*?)"
    r"(:(?P<tag>\w[\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1.5, "", "\0", "/", "../..", "/../x", "x" * 5000, "ü€\U0001f600", "\ud800", [], {},
    [None], [[]], {"": None}, {"a": {"b": []}},
)  # fmt: skip
_ISOLATED_S = 60.0


@dataclass(frozen=True)
class Subject:
    """The step type that is tested; ``problem``: why it can't be used."""

    host: PluginHost
    module: str
    attribute: str
    registered: RegisteredStepType | None
    problem: str = ""

    @property
    def usable(self) -> StepType:
        """The step type; the check is skipped if the plugin can't be used, which another check says."""
        if self.registered is None:
            pytest.skip("the plugin can't be used; see test_plugin_is_usable")
        return self.registered.step_type


@cache
def load(module: str, step_type: str) -> Subject:
    """The plugin, loaded as the agent loads it. ``module``: only that one, installed or not."""
    if module:
        host = PluginHost()
        try:
            plugin = importlib.import_module(module)
        except Exception as error:  # whatever a stranger's module does when it is imported
            return Subject(host, module, "", None, f"{module} can't be imported: {type(error).__name__}: {error}")
        report = host.register(plugin, name="tested", distribution=module, version="")
        problems = [] if report.ok else [report.error]
    else:
        host = PluginHost.load()
        problems = [f"{each.name}: {each.error}" for each in host.plugins if each.state == "error"]
    registered = host.step_types.get(step_type)
    if registered is None:
        there = ", ".join(sorted(host.step_types)) or "none"
        why = f"; {'; '.join(problems)}" if problems else ""
        return Subject(host, module, "", None, f"there is no step type {step_type!r}; there are: {there}{why}")
    attribute = ""
    if not module:
        (entry_point,) = {
            (each.module, each.attr or "")
            for each in importlib.metadata.entry_points(group="outrider.steps", name=registered.plugin)
        }
        module, attribute = entry_point
    return Subject(host, module, attribute, registered)


def plan(subject: Subject, request: StepRequest, policy: NodePolicy) -> PlannedStep:
    """The plan, made as on a node. Raises OutriderError with the node's sentence if there is none."""
    subject.usable  # noqa: B018 - skips
    return plan_step(request, subject.host, policy)


def schema_problems(subject: Subject) -> Iterator[str]:
    """What is wrong with the JSON Schemas."""
    step_type, registered = subject.usable, subject.registered
    assert registered is not None
    for label, schema in (("params", registered.params_schema), ("outputs", registered.outputs_schema)):
        if not schema and step_type.outputs is NoOutputs:
            continue
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
            json.dumps(schema, allow_nan=False)
        except (jsonschema.SchemaError, TypeError, ValueError) as error:
            yield f"the JSON Schema of {label} is not valid: {str(error).splitlines()[0]}"
            continue
        if schema.get("type") != "object":
            yield f"{label} must be a model with fields: its JSON Schema is no object"
        if label == "params" and not schema.get("properties") and schema.get("additionalProperties") is not False:
            yield "params take any keys: give the model a field for each"
        for where, model in open_objects(schema, label):
            yield f'{where}: keys pass that are no fields of it; write: class {model}(BaseModel, extra="forbid")'


def impurities(subject: Subject, params: BaseModel, context: StepContext) -> list[str]:
    """What resolve does that a pure function does not do."""
    resolve = subject.usable.resolve
    before = (params.model_dump(mode="json"), context_as_json(context))
    with watched() as found:
        resolve(params, context)
    problems = [f"resolve is not pure: {each}" for each in found]
    if before != (params.model_dump(mode="json"), context_as_json(context)):
        problems.append("resolve changes what it is given")
    return problems


def differences(subject: Subject, params: BaseModel, context: StepContext) -> list[str]:
    """Plans that differ: made twice here, and once in a process that shares nothing with this one."""
    first, second = (_dumped(subject.usable.resolve(params, context)) for _ in range(2))
    if first != second:
        return [f"resolve made two plans of the same parameters: they differ in {_fields(first, second)}"]
    other = _elsewhere(subject, params, context)
    if first != other:
        return [
            "resolve makes another plan in another process (with another hash seed, home, time zone and directory): "
            f"they differ in {_fields(first, other)}"
        ]
    return []


def secret_parameters(subject: Subject) -> list[str]:
    """Parameters that look like secrets."""
    model = subject.usable.params
    found = {path: None for by_alias in (True, False) for path in secrets(model.model_json_schema(by_alias=by_alias))}
    return [
        f"the parameter {path} looks like a secret: parameters stand in pipelines and plans for everybody to read; "
        "take it as an env, and name that in the step type's envs"
        for path in found
    ]


def secrets_in_plan(subject: Subject, params: BaseModel, context: StepContext) -> list[str]:
    """Values of envs in a plan: resolve is called where they stand in its environment."""
    canaries = _canaries(subject)
    if not canaries:
        return []
    made = json.dumps(_elsewhere(subject, params, context, tuple(canaries.items())))
    found = [name for name, value in canaries.items() if contains_secret(made.encode(), (value,))]
    return [f"the plan holds the value of the env {name}, which a plan never may" for name in found]


def image_problems(image: str) -> Iterator[str]:
    """What is wrong with the name of an image."""
    match = _REFERENCE.fullmatch(image)
    if match is None:
        yield f"{image!r} is not the name of an image"
    elif not match["digest"] and match["tag"] in (None, "latest"):
        yield f"the image {image} may be another one tomorrow: name its version, or a digest"


def refusal(subject: Subject, request: StepRequest, policy: NodePolicy) -> str | None:
    """The sentence with which parameters are refused; None if they are not."""
    subject.usable  # noqa: B018 - skips
    try:
        plan_step(request, subject.host, policy)
    except OutriderError as error:
        if not isinstance(error, InvalidInput) and not _is_refusal(error.__cause__):
            pytest.fail(f"these parameters are not refused, but break the plugin: {error}", pytrace=False)
        return str(error)
    return None


def crashes(subject: Subject, params: dict[str, Any], context: StepContext) -> Iterator[str]:
    """Odd values for each parameter, one at a time, that model or resolve break at."""
    step_type = subject.usable
    registered = subject.registered
    assert registered is not None
    for name in sorted({*params, *registered.params_schema.get("properties", {})}):
        for odd in _ODD:
            what = f"given {name}: {_short(odd)},"
            try:
                model = step_type.params.model_validate(params | {name: odd})
            except ValidationError:
                continue
            except Exception as error:  # whatever a stranger's validator raises
                yield f"{what} the params model breaks: {type(error).__name__}: {error}"
                return
            try:
                made = step_type.resolve(model, context)
                if not isinstance(made, StepPlan):
                    yield f"{what} resolve makes {_short(made)}, which is no StepPlan"
                    return
            except Exception as error:  # the same
                if not _is_refusal(error):
                    yield f"{what} resolve breaks: {type(error).__name__}: {error}; refuse it with a ValueError"
                    return


def progress_problems(data: bytes, *, wanted: bool) -> Iterator[str]:
    """What is wrong with the lines in /outrider/progress."""
    told = 0
    last: dict[tuple[Any, Any], float] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"line {number} of /outrider/progress"
        try:
            value = json.loads(line)
        except ValueError:
            yield f"{where} is not JSON: {_short(line.decode(errors='replace'))}"
            return
        if not isinstance(value, dict):
            yield f"{where} is not a JSON object"
            return
        if "error" in value:
            continue
        done: Any = value.get("done")
        total, unit = value.get("total"), value.get("unit")
        if not _is_count(done) or not (total is None or _is_count(total)) or not isinstance(unit, str):
            yield f"{where} has no done (a number), total (a number or null) and unit (a text): {_short(value)}"
            return
        if total is not None and done > total:
            yield f"{where} says that {done} of {total} {unit} are done"
            return
        kind = (unit, value.get("message"))
        if done < last.get(kind, 0):
            yield f"{where} goes back, from {last[kind]} to {done} {unit}"
            return
        last[kind] = done
        told += 1
    if wanted and not told:
        yield "the program never told how far it is; append a line to /outrider/progress (or say progress = False)"


def cause_problems(data: bytes, code: str, says: str) -> Iterator[str]:
    """What is wrong with the cause of a failure in /outrider/progress."""
    causes = []
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("error"), str):
            causes.append(value)
    if not causes:
        yield 'it did not say why: append {"error": "one sentence", "code": "snake_case"} to /outrider/progress'
        return
    sentence, given = causes[-1]["error"], causes[-1].get("code")
    if not sentence.strip() or "\n" in sentence or _CRASH.search(sentence):
        yield f"the cause is no sentence for a person: {_short(sentence)}"
    if not isinstance(given, str) or not _CODE.fullmatch(given):
        yield f"the code of the cause is {given!r}; it reads like not_found"
    elif code and given != code:
        yield f"the code of the cause is {given!r} and should be {code!r}: {sentence}"
    if says not in sentence:
        yield f"the cause does not say {says!r}: {sentence}"


def written_paths(subject: Subject, params: dict[str, Any], volumes: Mapping[str, GivenVolume]) -> list[str]:
    """What the parameters say is written, as ``volume/path``."""
    registered = subject.registered
    assert registered is not None
    found = []
    for _, value, keyword, meaning in marked_values(registered.params_schema, params, "with"):
        for volume, mount in volumes.items():
            under = isinstance(value, str) and f"{value}/".startswith(f"{mount.path}/")
            if under and (keyword, meaning) == ("x-outrider-path", "write"):
                found.append(f"{volume}{value.removeprefix(mount.path)}".rstrip("/"))
    return found


def tree(volumes: Mapping[str, Path]) -> dict[str, str]:
    """Everything in the volumes: ``volume/path`` to what it is. Names that begin with a dot are a program's own."""
    found: dict[str, str] = {}
    for name, root in volumes.items():
        for folder, directories, files in os.walk(root):
            directories[:] = [each for each in directories if not each.startswith(".")]
            for each in (*directories, *files):
                path = Path(folder, each)
                if not each.startswith("."):
                    found[f"{name}/{path.relative_to(root).as_posix()}"] = _content(path)
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str], *, within: Sequence[str] | None = None) -> list[str]:
    """Paths that are new, gone, or other than before; of those at and below ``within``, if given."""
    found = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    if within is None:
        return found
    return [path for path in found if any(path == each or path.startswith(f"{each}/") for each in within)]


def _content(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(status.st_mode):
        return f"kind {stat.S_IFMT(status.st_mode)}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _elsewhere(
    subject: Subject, params: BaseModel, context: StepContext, envs: tuple[tuple[str, str], ...] = ()
) -> dict[str, Any]:
    """The plan that resolve makes in a process that shares nothing with this one but the code."""
    cases = [{"params": params.model_dump(mode="json", by_alias=True), "context": context_as_json(context)}]
    request = {
        "path": [str(Path(each).resolve()) for each in sys.path],
        "module": subject.module,
        "attribute": subject.attribute,
        "step_type": subject.usable.name,
        "cases": cases,
    }
    return _made_elsewhere(json.dumps(request, sort_keys=True), envs)


@cache
def _made_elsewhere(request: str, envs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    environ = {
        **dict(envs),
        "PATH": os.environ.get("PATH", ""),
        "PYTHONHASHSEED": "4711",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/nonexistent",
        "USER": "nobody",
        "TZ": "Pacific/Kiritimati",
        "LANG": "C",
    }
    if "PYTHONPATH" in os.environ:
        environ["PYTHONPATH"] = os.environ["PYTHONPATH"]
    ended = subprocess.run(
        # By its path, and nothing beside it: importing the kit would cost more than all the rest.
        [sys.executable, "-P", _isolated.__file__],
        input=request,
        env=environ,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=_ISOLATED_S,
        check=False,
    )
    if ended.returncode != 0:
        reason = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        pytest.fail(f"resolve does not work in another process: {reason[0]}", pytrace=False)
    plans: list[dict[str, Any]] = json.loads(ended.stdout)
    return plans[0]


def _canaries(subject: Subject) -> dict[str, str]:
    """A value for each env of the step type that stands nowhere else."""
    names = [name for name in subject.usable.envs if name != "*"]
    return {name: f"canary-{hashlib.sha256(name.encode()).hexdigest()[:20]}" for name in names}


def _dumped(made: Any) -> dict[str, Any]:
    if not isinstance(made, StepPlan):
        pytest.fail(f"resolve made {_short(made)}, which is no StepPlan", pytrace=False)
    dumped: dict[str, Any] = json.loads(json.dumps(made.model_dump(mode="json")))
    return dumped


def _fields(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    differing = [name for name in one if one[name] != other.get(name)]
    return ", ".join(f"{name} ({_short(one[name])} and {_short(other.get(name))})" for name in differing)


def _is_refusal(error: BaseException | None) -> bool:
    """What a plugin may raise for what can't be done; a ValueError's own kinds are accidents, but for pydantic's."""
    return isinstance(error, OutriderError | ValidationError | PluginError) or type(error) is ValueError


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
