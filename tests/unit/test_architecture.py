"""The boundaries of docs/architecture.md, held by reading every import statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each room may import of ours; standard library and third parties are not looked at.
ALLOWED = {
    "outrider": ("outrider",),
    "outrider/testing": ("outrider", "agent_core"),  # the kit runs steps as an agent does, not in its own likeness
    "outrider/cli": ("outrider", "agent_core", "server_core"),
    "agent_core": ("outrider", "agent_core"),
    "server_core": ("outrider", "server_core"),
    "stepkit/outrider_stepkit": ("outrider_stepkit",),
}
OURS = ("outrider", "agent_core", "server_core", "outrider_stepkit", "outrider_step_")
HEAVY = ("grpc", "rich", "pydantic", "yaml", "docker", "boto3", "sqlalchemy", "stevedore", "google")


def imports(file: Path, *, top_level: bool = False) -> Iterator[tuple[int, str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def room_of(file: Path) -> str:
    relative = file.relative_to(ROOT).as_posix()
    return max((room for room in ALLOWED if relative.startswith(room + "/")), key=len)


@pytest.mark.parametrize("room", ["outrider", "agent_core", "server_core", "stepkit/outrider_stepkit"])
def test_no_room_reaches_into_one_that_it_may_not(room: str) -> None:
    strays = []
    files = [file for file in (ROOT / room).rglob("*.py") if "outrider/v1" not in file.as_posix()]
    assert files
    for file in files:
        allowed = ALLOWED[room_of(file)]
        for line, module in imports(file):
            top = module.split(".")[0]
            if top.startswith(OURS) and top not in allowed:
                strays.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not strays


def test_a_plugin_imports_nothing_of_ours_but_the_step_sdk() -> None:
    strays = []
    modules = list(ROOT.glob("plugins/*/outrider_step_*/**/*.py"))
    assert modules
    for file in modules:
        for line, module in imports(file):
            own = module.startswith(file.relative_to(ROOT / "plugins").parts[1])
            if module.startswith(OURS) and not own and module != "outrider.steps":
                strays.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not strays


def test_the_command_line_starts_without_anything_heavy() -> None:
    strays = []
    # The connection, `outrider dev` proper, installing: commands import them when they run (test_cli_start.py looks).
    late = {"_client.py", "_dev.py", "_install.py"}
    commands = [file for file in (ROOT / "outrider/cli").glob("*.py") if file.name not in late]
    for file in [ROOT / "outrider/__init__.py", *commands]:
        for line, module in imports(file, top_level=True):
            if module.split(".")[0] in HEAVY:
                strays.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not strays
