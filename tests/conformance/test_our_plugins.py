"""Every step type of our own plugins is held to the kit."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PLUGINS = sorted(Path(__file__).parents[2].glob("plugins/*"))


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_every_step_type_has_a_conformance_class(plugin: Path) -> None:
    module = importlib.import_module(f"outrider_step_{plugin.name}")
    there = {step_type.name for step_type in module.outrider_step_types()}
    assert there
    tested = []
    for each in ast.parse((plugin / "tests" / "test_conformance.py").read_text()).body:
        # A class that pytest does not collect checks nothing.
        if isinstance(each, ast.ClassDef) and each.name.startswith("Test"):
            tested += [
                ast.literal_eval(line.value)
                for line in each.body
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "step_type"
            ]
    assert sorted(tested) == sorted(there)
