"""The plugin host with plugins that are broken in every way that plugins are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from agent_core.plugins import PluginHost
from outrider.errors import ErrorClass
from outrider.steps import StepContext, StepOutcome, StepPlan, StepType, hookimpl

GOOD = """
from pydantic import BaseModel
from outrider.steps import StepPlan, StepType, hookimpl
class P(BaseModel): pass
@hookimpl
def outrider_step_types():
    return [StepType(name="{type}", params=P, resolve=lambda p, c: StepPlan(image="i"))]
"""

# What is wrong with the module -> what the report must say.
BROKEN = {
    "import_error": ("import no_such_module_here", "no_such_module_here"),
    "raises": ("raise RuntimeError('boom')", "boom"),
    "exits": ("raise SystemExit(3)", "SystemExit"),
    "asserts": ("assert False, 'never'", "AssertionError"),
    "syntax": ("def (", "SyntaxError"),
    "bad_signature": (
        "from outrider.steps import hookimpl\n@hookimpl\ndef outrider_step_types(wrong): return []",
        "wrong",
    ),
    "misspelt": (
        "from outrider.steps import hookimpl\n@hookimpl\ndef outrider_step_type(): return []",
        "outrider_step_type",
    ),
    "not_a_list": ("from outrider.steps import hookimpl\n@hookimpl\ndef outrider_step_types(): return 5", "list"),
    "not_a_type": ("from outrider.steps import hookimpl\n@hookimpl\ndef outrider_step_types(): return [5]", "StepType"),
    "hook_exits": (
        "from outrider.steps import hookimpl\n@hookimpl\ndef outrider_step_types(): raise SystemExit",
        "SystemExit",
    ),
    "duplicate_type": (GOOD.format(type="good.step"), "good.step"),
}


def install(site: Path, distribution: str, entry_point: str, module: str, source: str) -> None:
    """A distribution as an installer would leave it."""
    (site / f"{module}.py").write_text(source)
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[outrider.steps]\n{entry_point} = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_broken_plugin_is_reported_by_name_and_the_others_work(site: Path, case: str) -> None:
    source, says = BROKEN[case]
    install(site, "a-good-one", "agood", f"good_{case}", GOOD.format(type="good.step"))
    install(site, "z-broken-one", "zbroken", f"broken_{case}", source)
    host = PluginHost.load(["agood", "zbroken"])
    reports = {report.name: report for report in host.plugins}
    assert reports["agood"].ok
    assert list(host.step_types) == ["good.step"]
    broken = reports["zbroken"]
    assert not broken.ok
    assert says in broken.error
    assert "zbroken" in broken.error
    assert broken.distribution == "z-broken-one"


def test_a_disabled_plugin_is_not_even_imported(site: Path) -> None:
    install(site, "x-off", "off", "module_that_is_off", GOOD.format(type="off.step"))
    host = PluginHost.load(["off"], disabled=["off"])
    (report,) = (each for each in host.plugins if each.name == "off")
    assert (report.state, report.ok, report.distribution) == ("disabled", False, "x-off")
    assert "module_that_is_off" not in sys.modules


def test_an_enabled_plugin_that_is_not_installed_is_reported() -> None:
    (report,) = (each for each in PluginHost.load(["nowhere"]).plugins if each.state == "error")
    assert "nowhere" in report.error


def test_two_distributions_with_one_name_are_both_told(site: Path) -> None:
    install(site, "first-dist", "twice", "twice_a", GOOD.format(type="first.step"))
    install(site, "second-dist", "twice", "twice_b", GOOD.format(type="second.step"))
    host = PluginHost.load(["twice"])
    assert list(host.step_types) == ["first.step"]
    loser = next(report for report in host.plugins if report.state == "error")
    assert (loser.distribution, "first-dist" in loser.error) == ("second-dist", True)


class Params(BaseModel):
    pass


def resolve(_params: Params, _context: StepContext) -> StepPlan:
    return StepPlan(image="i")


class Bad:
    @hookimpl
    def outrider_after_step(self) -> None:
        raise SystemExit

    @hookimpl
    def outrider_classify_failure(self, exit_code: int) -> ErrorClass | None:
        raise RuntimeError(exit_code)

    @hookimpl
    def outrider_node_facts(self) -> dict[str, object]:
        return {"gpu": object()}


class Good:
    def __init__(self) -> None:
        self.heard = 0

    @hookimpl
    def outrider_after_step(self, outcome: StepOutcome) -> None:
        self.heard += outcome.succeeded

    @hookimpl
    def outrider_classify_failure(self, exit_code: int) -> ErrorClass | None:
        return ErrorClass.TEMPORARY if exit_code == 28 else None

    @hookimpl
    def outrider_node_facts(self) -> dict[str, object]:
        return {"disks": 2}


def test_one_raising_hook_does_not_stop_the_others() -> None:
    host = PluginHost()
    good = Good()
    for plugin in (Bad(), good, Bad()):
        assert host.register(plugin, name=f"p{id(plugin)}", distribution="d", version="1").ok
    host.after_step("x.y", StepContext("r", "s"), StepOutcome(0, True))
    assert good.heard == 1
    assert host.classify("x.y", 28, "") is ErrorClass.TEMPORARY
    assert host.classify("x.y", 1, "") is None
    assert host.node_facts() == {"disks": 2}


def test_a_step_type_has_its_schemas() -> None:
    host = PluginHost()

    class Plugin:
        @hookimpl
        def outrider_step_types(self) -> list[StepType]:
            return [StepType(name="a.b", params=Params, resolve=resolve)]

    assert host.register(Plugin(), name="p", distribution="d", version="1").step_types == ("a.b",)
    assert host.step_types["a.b"].params_schema["type"] == "object"
    assert host.step_types["a.b"].outputs_schema == {}
