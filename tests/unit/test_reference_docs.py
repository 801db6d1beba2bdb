"""Every hook, plan field and setting stands in the documents, and nothing stands there that is not so."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import agent_core.config
import outrider.steps
import server_core.config
from agent_core.config import AgentConfig
from agent_core.policy import NodePolicy
from outrider import launcher, schema
from outrider._plugin_hooks import MAX_FACTS_BYTES, hook_names
from outrider._yaml import compose, plain
from outrider.plugin_host import LIMIT_S, StepPlugins
from outrider.roles import Role
from outrider.steps import (
    CONTRACT,
    ErrorClass,
    ObjectContext,
    Resources,
    StepContext,
    StepHooks,
    StepOutcome,
    StepPlan,
    StepType,
    VolumeMount,
    hookimpl,
)
from server_core.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = (DOCS / "step-reference.md").read_text(encoding="utf-8")
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
COMMANDS = (DOCS / "cli.md").read_text(encoding="utf-8")
AUTHORS = (DOCS / "step-authors.md").read_text(encoding="utf-8")
DESCRIBED = (StepType, StepPlan, Resources, StepContext, VolumeMount, ObjectContext, StepOutcome)


def section(title: str, page: str = REFERENCE) -> str:
    """What stands below a heading, up to the next of any depth."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^##+ |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, f"there is no section {title}"
    return found[1]


def first_cells(text: str) -> set[str]:
    """The names in the first column of the tables."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("kind", DESCRIBED, ids=lambda kind: kind.__name__)
def test_every_field_of_the_contract_has_its_row(kind: type) -> None:
    fields = set(kind.model_fields) if issubclass(kind, BaseModel) else {each.name for each in dataclasses.fields(kind)}
    assert first_cells(section(f"`{kind.__name__}`")) == fields


def arguments(hook: str) -> list[str]:
    return list(inspect.signature(getattr(StepHooks, hook)).parameters)[1:]


@pytest.mark.parametrize("hook", hook_names())
def test_every_hook_has_its_section_with_the_example_of_its_docstring(hook: str) -> None:
    text = section(f"`{hook}({', '.join(arguments(hook))})`")
    example = _example(hook)
    assert example in text, "the page has another example than outrider/steps.py"


def test_the_page_describes_no_hook_that_there_is_not() -> None:
    assert set(re.findall(r"^### `(outrider_\w+)", REFERENCE, re.MULTILINE)) == set(hook_names())


@pytest.mark.parametrize("hook", hook_names())
def test_the_example_of_a_hook_works(hook: str) -> None:
    """It is bound as a plugin's is, and called as the core calls it."""
    module = types.ModuleType("example")
    log: list[Any] = []
    counter = types.SimpleNamespace(labels=lambda *_: types.SimpleNamespace(inc=lambda: log.append(1)))
    names = {
        "hookimpl": hookimpl,
        "StepType": StepType,
        "CopyParams": type("CopyParams", (BaseModel,), {}),
        "resolve_copy": lambda params, context: StepPlan(image="i"),
        "ErrorClass": ErrorClass,
        "counter": counter,
        "has_gpu": lambda: True,
        "log": types.SimpleNamespace(info=lambda text, *values: log.append(text % values)),
    }
    exec(_example(hook), names | vars(module), vars(module))
    # In a module its functions see what the module has.
    getattr(module, hook).__globals__.update(names)
    host = StepPlugins()
    report = host.register(module, name="example", distribution="example", version="1")
    assert report.ok, report.error
    context = StepContext("r", "s")
    host.before_step("example.copy", context, StepPlan(image="i"))
    host.after_step("example.copy", context, StepOutcome(0, True))
    classified = host.classify("example.copy", 28, "the disk is full")
    facts = host.node_facts()
    assert not host.failures
    did = {
        "outrider_step_types": report.step_types == ("example.copy",),
        "outrider_before_step": log == ["s of r starts from i"],
        "outrider_after_step": log == [1],
        "outrider_classify_failure": classified is ErrorClass.TEMPORARY,
        "outrider_node_facts": facts == {"gpu": True},
    }
    assert did.pop(hook)
    assert not any(did.values())


def _example(hook: str) -> str:
    text = inspect.getdoc(getattr(StepHooks, hook)) or ""
    head, marker, code = text.partition("Example::\n\n")
    assert marker, f"the docstring of {hook} has no example"
    assert head.strip(), f"the docstring of {hook} does not say what it is for"
    return textwrap.dedent(code).strip() + "\n"


def test_what_a_plugin_can_import_is_described() -> None:
    made_here: set[str] = set()
    for statement in ast.parse(inspect.getsource(outrider.steps)).body:
        match statement:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                made_here.add(name)
    public = {name for name in made_here if not name.startswith("_")}
    assert set(outrider.steps.__all__) == public | {"ErrorClass"}
    missing = [name for name in outrider.steps.__all__ if f"`{name}`" not in REFERENCE and f"@{name}" not in REFERENCE]
    assert not missing


def test_the_page_has_the_numbers_that_count() -> None:
    assert f"now {CONTRACT}." in REFERENCE
    assert f"has {LIMIT_S:g}\nseconds" in REFERENCE
    assert f"at most {MAX_FACTS_BYTES // 1024} KiB" in REFERENCE


def test_every_keyword_of_schemas_is_described() -> None:
    sources = [Path(inspect.getsourcefile(each) or "") for each in (outrider.steps, schema)]
    used = {word for file in sources for word in re.findall(r'"(x-outrider-[a-z-]+)"', file.read_text())}
    assert used
    assert [word for word in sorted(used) if f'"{word}"' not in REFERENCE] == []


def table(head: str, title: str, page: str) -> dict[str, str]:
    """A table by its first heading: each name in the first column to the second one's text."""
    found = re.search(rf"^\| {head} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", section(title, page), re.MULTILINE)
    assert found is not None, f"{title} has no table with the column {head!r}"
    return {
        name: cells[2].strip()
        for cells in (row.split("|") for row in found[1].splitlines())
        for name in re.findall(r"`([^`]+)`", cells[1])
    }


@pytest.mark.parametrize(
    ("head", "title", "model"),
    [("setting", "The server", ServerConfig), ("setting", "Nodes", AgentConfig), ("key", "Roles of nodes", Role)],
    ids=["server", "agent", "role"],
)
def test_every_setting_has_its_row_and_every_row_its_setting(head: str, title: str, model: type[BaseModel]) -> None:
    rows = table(head, title, OPERATIONS)
    assert rows.keys() == model.model_fields.keys()
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    assert {name for name, default in rows.items() if default == "required"} == required


def test_every_option_of_the_launcher_has_its_row_and_its_default() -> None:
    source = inspect.getsource(launcher)
    given = re.findall(r'add_argument\("(--[a-z-]+)", .*?default=(\w+)', source)
    assert len(given) >= 5
    shown = table("option", "Plugins of a node", OPERATIONS)
    assert shown == {option: f"{getattr(launcher, constant):g}" for option, constant in given}


def variables(*packages: str) -> set[str]:
    """Environment variables of ours that the code names: texts that are one, and not sentences with one."""
    return {
        node.value
        for package in packages
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"OUTRIDER_[A-Z_]*[A-Z]", node.value)
    }


def test_every_environment_variable_has_its_row_and_every_row_its_variable() -> None:
    settings = {
        module.ENV_PREFIX + name.upper()
        for module, model in ((agent_core.config, AgentConfig), (server_core.config, ServerConfig))
        for name in model.model_fields
    }
    used = variables("outrider", "agent_core", "server_core", "stepkit/outrider_stepkit") - settings
    of_people = table("variable", "Environment variables", COMMANDS).keys()
    of_steps = first_cells(section("The contract between agent and program", AUTHORS))
    assert used == of_people | {name for name in of_steps if name.startswith("OUTRIDER_")}


def policy() -> dict[str, Any]:
    """The policy file that stands in the documentation."""
    text = OPERATIONS[OPERATIONS.index("### The node's policy") :]
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    root, problems = compose(block[1].replace("sha256:…", "sha256:" + 64 * "0"))
    assert root is not None
    assert problems == []
    return dict(plain(root))


def test_the_policy_in_the_documentation_is_one() -> None:
    NodePolicy.model_validate(policy())


def test_every_key_of_the_policy_stands_in_the_documentation() -> None:
    missing: list[str] = []

    def compare(model: type[BaseModel], shown: dict[str, Any], path: str) -> None:
        missing.extend(f"{path}{name}" for name in model.model_fields if name not in shown)
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(shown.get(name), dict):
                compare(inner, shown[name], f"{path}{name}.")
            for each in typing.get_args(inner):
                if isinstance(each, type) and issubclass(each, BaseModel):
                    compare(each, next(iter(shown[name].values())), f"{path}{name}.*.")

    compare(NodePolicy, policy(), "")
    assert missing == []
