"""Every kind of broken plugin, as real distributions: named with reason and fix, and nothing else affected."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, Field

from agent_core.plugins import PluginHost
from outrider._plugin_discovery import PluginError, check_contract
from outrider.errors import ErrorClass
from outrider.plugin_host import StepPlugins
from outrider.schema import installed_step_types
from outrider.steps import CONTRACT, StepContext, StepOutcome, StepPlan, StepType, hookimpl
from outrider.v1 import types_pb2
from tests.plugin_fixtures import NAMES, install

# What is broken -> what its reason says, what its fix says.
BROKEN = {
    "import-error": ("no_such_package_here", "reinstall or upgrade outrider-fixture-import-error"),
    "exits": ("SystemExit: 3", "disabled_plugins: [exits]"),
    "asserts": ("AssertionError: never", "disabled_plugins: [asserts]"),
    "interrupts": ("KeyboardInterrupt", "disabled_plugins: [interrupts]"),
    "syntax-error": ("SyntaxError", "reinstall"),
    "hostile-error": ("Hostile", "reinstall"),
    "ugly-error": ("boom", "reinstall"),
    "slow-import": ("its import had not ended after", "disabled_plugins: [slow-import]"),
    "hanging-import": ("its import had not ended after", "disabled_plugins: [hanging-import]"),
    "hook-hangs": ("outrider_step_types had not ended after", "disabled_plugins: [hook-hangs]"),
    "contract-newer": (f"contract versions >=2,<3, and this Outrider has {CONTRACT}", "upgrade Outrider, or install"),
    "contract-older": (f"contract versions >=0.3,<1, and this Outrider has {CONTRACT}", "upgrade outrider-fixture-"),
    "contract-computed": ("contract versions >=42", "upgrade Outrider"),
    "contract-unreadable": ("'one, or two', which is no range", 'outrider_contract = ">=1,<2"'),
    "contract-number": ("outrider_contract = 1, which is no range", 'outrider_contract = ">=1,<2"'),
    "missing-module": ("outrider_fixture_that_is_nowhere", "reinstall"),
    "missing-attribute": ("has no attribute 'plugin'", "reinstall"),
    "no-reference": ("'not a module!', which names no module", "no-reference = package.module"),
    "not-a-module": ("int of plugin 'not-a-module' implements no hook", "name a module"),
    "a-function": ("names the function outrider_step_types", "without `:…`"),
    "a-class": ("names the class Plugin", "without `:…`"),
    "no-hooks": ("implements no hook", "marked with @hookimpl"),
    "bad-signature": ("takes config, which the hook does not give", "it takes no argument"),
    "misspelt-hook": ("outrider_step_type, and there is no such hook", "did you mean outrider_step_types?"),
    "unknown-hook": ("outrider_on_sunday, and there is no such hook", "there are outrider_after_step, outrider_before"),
    "unmarked-hook": ("outrider_step_types of plugin 'unmarked-hook' is never called", "mark it with @hookimpl"),
    "wrapper-hook": ("is a wrapper", "@hookimpl alone"),
    "async-hook": ("is no plain function", "`def` and `return`"),
    "hook-raises": ("RuntimeError: no step types today", "install another version"),
    "hook-exits": ("SystemExit", "install another version"),
    "not-a-list": ("gives an int", "list of StepType"),
    "not-a-step-type": ("gives a str among its step types", "StepType objects"),
    "bad-name": ("'Bad' is not the name of a step type", "its author has to rename that step type"),
    "bad-params": ("params of step type bad.params is the class dict", "pydantic model's class"),
    "bad-outputs": ("outputs of step type bad.outputs is a Params", "pydantic model's class"),
    "bad-envs": ("envs of step type bad.envs", 'envs=["NAME"]'),
    "bad-public-envs": ("public_envs of step type bad.publicenvs", "list them there"),
    "bad-resolve": ("resolve of step type bad.resolve can't be called: too many", "(params, context)"),
    "async-resolve": ("resolve of step type async.resolve is async", "`def`"),
    "no-schema": ("step type no.schema have no JSON Schema", "WithJsonSchema"),
    "not-an-object": ("params of step type no.object are no object", "fields"),
    "huge-schema": ("schemas of step type huge.schema have 1000", "documentation"),
    "unsendable": ("what step type unsendable.step says of itself can't be sent", "Unicode"),
    "twice-in-one": ("gives twice.step twice", "each once"),
    "duplicate-type": ("", ""),  # only beside another; see below
}
WORKS = {
    "good": (),
    "prints": (),
    "contract-undeclared": ("declares no contract range",),
    "forgiving": ("a misspelt parameter of forgiving.step is not noticed",),
    "failing-hooks": (),
    "late-import": (),  # only where it may take less; see below
}
# These are looked at in tests of their own.
APART = {"duplicate-name", "damaged-metadata", "damaged-entry-points", "ends-process"}
SLOW = {"slow-import", "hanging-import", "hook-hangs"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("outrider_fixture")]:
        del sys.modules[name]


def test_every_fixture_has_its_test() -> None:
    assert set(NAMES) == BROKEN.keys() | WORKS.keys() | APART


@pytest.mark.parametrize("case", sorted(BROKEN.keys() - {"duplicate-type"}))
def test_a_broken_plugin_is_named_with_reason_and_fix_and_the_others_work(site: Path, case: str) -> None:
    install(site, "good", case)
    host = PluginHost.load(["good", case], limit_s=0.5 if case in SLOW else 30)
    reports = {report.name: report for report in host.plugins if report.state != "disabled"}
    assert reports["good"].ok
    assert list(host.step_types) == ["good.step"]
    broken = reports[case]
    reason, fix = BROKEN[case]
    assert (broken.state, broken.ok) == ("error", False)
    assert reason in broken.error
    assert fix in broken.fix
    assert broken.error.endswith(broken.fix)
    assert (broken.distribution, broken.version) == (f"outrider-fixture-{case}", "1.0")
    # It can be shown in a line, and sent.
    assert broken.error.isprintable()
    assert len(broken.error) < 1000
    types_pb2.Plugin(error=broken.error).SerializeToString()


@pytest.mark.parametrize("case", sorted(WORKS))
def test_what_could_be_better_is_noted_of_a_plugin_that_works(site: Path, case: str) -> None:
    install(site, case)
    (report,) = (each for each in PluginHost.load([case]).plugins if each.name == case)
    assert report.ok, report.error
    assert len(report.notes) == len(WORKS[case])
    for note, words in zip(report.notes, WORKS[case], strict=True):
        assert words in note
    assert report.contract == ("" if case == "contract-undeclared" else ">=1,<2")


def test_all_of_them_at_once_leave_the_good_one_alone(site: Path) -> None:
    install(site, *(set(NAMES) - {"duplicate-name"}))
    host = PluginHost.load(disabled=["ends-process", "s3", "http", "archive", "container"], limit_s=1)
    states = {report.name: report.state for report in host.plugins}
    for case in BROKEN.keys() - {"duplicate-type"}:
        assert states[case] == "error", case
    # Entry points are loaded in the order of their names: of two that want the same step type the first has it.
    assert host.step_types["good.step"].distribution == "outrider-fixture-duplicate-type"
    loser = next(report for report in host.plugins if report.distribution == "outrider-fixture-good")
    assert "also that of outrider-fixture-duplicate-type, which was loaded first" in loser.error
    assert loser.fix == "disable one of the two plugins by name: disabled_plugins: [good], or [duplicate-type]"
    assert {"prints.step", "undeclared.step", "forgiving.step"} < host.step_types.keys()
    assert host.listens("outrider_before_step")


def test_the_same_is_said_without_an_agent(site: Path) -> None:
    """`outrider pipeline validate` stands on the same loader."""
    install(site, "good", "import-error", "misspelt-hook", "prints")
    types, problems = installed_step_types()
    assert types["good.step"].distribution == "outrider-fixture-good"
    hints = {problem.hint for problem in problems}
    assert "did you mean outrider_step_types?" in hints
    assert any(
        "no_such_package_here" in problem.message and problem.hint not in problem.message for problem in problems
    )


@pytest.mark.parametrize(
    ("enabled", "disabled", "note"),
    [
        (None, ["good"], "it is named in `disabled_plugins`"),
        (["good"], ["good"], "it is named in `disabled_plugins`"),
        (["other"], [], "`plugins` does not name it"),
    ],
)
def test_what_is_disabled_is_not_even_imported(
    site: Path, enabled: list[str] | None, disabled: list[str], note: str
) -> None:
    install(site, "good")
    host = StepPlugins.load(enabled, [*disabled, "s3", "http", "archive", "container"])
    (report,) = (each for each in host.plugins if each.name == "good")
    assert (report.state, report.ok, report.notes) == ("disabled", False, (note,))
    assert report.distribution == "outrider-fixture-good"
    assert "outrider_fixture_good" not in sys.modules
    assert not host.step_types


def test_a_plugin_of_another_contract_is_not_even_imported(site: Path) -> None:
    install(site, "contract-newer")
    (report,) = (each for each in StepPlugins.load(["contract-newer"]).plugins if each.state == "error")
    assert "Dependencies" not in report.error  # what its import would have said
    assert report.contract == ">=2,<3"
    assert "outrider_fixture_contract_newer" not in sys.modules


@given(st.text(max_size=20) | st.from_regex(r"(==|!=|<=|>=|<|>|~=|===) ?[0-9.*a]{1,6}(, ?<[0-9]+)?", fullmatch=True))
@example("")
@example("===x")
@example("==1.*")
@example("~=1.0")
@example(">=1,<2")
def test_whatever_a_plugin_declares_it_fits_or_is_refused_with_a_fix(declared: str) -> None:
    refusal = None
    try:
        check_contract(declared, "p", "outrider-p")
    except PluginError as error:
        refusal = error
    if refusal is None:
        assert SpecifierSet(declared).contains(CONTRACT, prereleases=True)
    else:
        assert refusal.fix
        assert "'p'" in refusal.reason


@pytest.mark.parametrize(
    ("declared", "fix"),
    [
        (">=1.7,<2", "upgrade Outrider, or install a version of outrider-p that works with 1.0"),
        ("~=2.1", "upgrade Outrider, or install a version of outrider-p that works with 1.0"),
        ("==2.*", "upgrade Outrider, or install a version of outrider-p that works with 1.0"),
        ("<1", "upgrade outrider-p to a version that works with 1.0"),
        (">=0.3,<1", "upgrade outrider-p to a version that works with 1.0"),
        ("!=1.0", "upgrade outrider-p to a version that works with 1.0"),
    ],
)
def test_the_fix_of_a_contract_that_does_not_fit_says_who_is_to_be_upgraded(declared: str, fix: str) -> None:
    with pytest.raises(PluginError) as raised:
        check_contract(declared, "p", "outrider-p")
    assert raised.value.fix == fix
    assert declared in raised.value.reason


def test_a_slow_import_is_noted(site: Path) -> None:
    host = StepPlugins(slow_s=0)
    assert any(
        "to import; let it import what is heavy" in each
        for each in host.register(Good(), name="good", distribution="d", version="1").notes
    )


def test_an_import_that_takes_long_for_what_it_may_is_noted(site: Path) -> None:
    install(site, "late-import")
    (report,) = (each for each in StepPlugins.load(["late-import"], limit_s=3).plugins if each.state != "disabled")
    assert report.ok
    assert "s to import; let it import what is heavy where it is used" in report.notes[0]


def test_a_name_that_is_not_installed_is_said_with_the_nearest_that_is(site: Path) -> None:
    install(site, "good")
    host = StepPlugins.load(["goood", "good"], ["goodd"])
    wanted, unwanted = (next(each for each in host.plugins if each.name == name) for name in ("goood", "goodd"))
    assert (wanted.state, wanted.fix) == ("error", "did you mean good?")
    assert (unwanted.state, unwanted.ok) == ("disabled", False)
    assert "did you mean good?" in unwanted.notes[0]
    assert "good.step" in host.step_types


def test_two_distributions_with_one_name_are_both_told(site: Path) -> None:
    install(site, "good", "duplicate-name")
    host = StepPlugins.load(["good"])
    assert list(host.step_types) == ["other.step"]
    loser = next(report for report in host.plugins if report.state == "error")
    assert loser.distribution == "outrider-fixture-good"
    assert "'good' is also that of outrider-fixture-duplicate-name, which is used" in loser.error
    assert loser.fix == "uninstall one of the two distributions"
    assert "outrider_fixture_good" not in sys.modules


@pytest.mark.parametrize(
    ("case", "says"),
    [("damaged-metadata", "fixture_damaged-1.0.dist-info"), ("damaged-entry-points", "fixture_torn-1.0.dist-info")],
)
def test_a_distribution_that_an_installer_left_half_done_hides_no_other(site: Path, case: str, says: str) -> None:
    install(site, "good", case)
    host = StepPlugins.load(["good"])
    assert list(host.step_types) == ["good.step"]
    damaged = next(report for report in host.plugins if report.state == "error")
    assert says in damaged.error
    assert damaged.fix == "install it anew, or remove that directory"


def test_of_two_copies_on_the_path_the_first_counts(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "good")
    hidden = install(tmp_path / "behind", "good")
    monkeypatch.setattr(sys, "path", [*sys.path, str(hidden)])
    reports = [each for each in StepPlugins.load(["good"]).plugins if each.state != "disabled"]
    assert [each.state for each in reports] == ["ok"]


def test_a_loop_that_was_given_up_on_does_not_go_on_for_ever(site: Path) -> None:
    install(site, "slow-import")
    before = set(threading.enumerate())
    StepPlugins.load(["slow-import"], limit_s=0.2)
    until = time.monotonic() + 60
    while set(threading.enumerate()) - before:
        assert time.monotonic() < until, "its import goes on"
        time.sleep(0.01)


class Params(BaseModel, extra="forbid"):
    pass


class Outputs(BaseModel):
    sizes: list[int] = Field(default_factory=list)


def resolve(_params: Params, _context: StepContext) -> StepPlan:
    return StepPlan(image="i")


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


class Facts:
    def __init__(self, answer: object) -> None:
        self.answer = answer

    @hookimpl
    def outrider_node_facts(self) -> object:
        return self.answer


class Hanging:
    @hookimpl
    def outrider_after_step(self) -> None:
        while True:
            time.sleep(0.01)


def test_hooks_that_fail_stop_no_other_and_are_counted(site: Path) -> None:
    install(site, "failing-hooks")
    host, good = PluginHost.load(["failing-hooks"]), Good()
    assert host.register(good, name="good", distribution="d", version="1").ok
    context, plan = StepContext("r", "s"), StepPlan(image="i")
    for _ in range(3):
        host.before_step("x.y", context, plan)
        host.after_step("x.y", context, StepOutcome(0, True))
    assert good.heard == 3
    assert host.classify("x.y", 28, "") is ErrorClass.TEMPORARY
    assert host.classify("x.y", 1, "") is None
    assert host.node_facts() == {"disks": 2}
    said = {hook: (failure.count, failure.error) for (_, hook), failure in host.failures.items()}
    assert said["outrider_before_step"] == (
        3,
        "outrider_before_step of plugin 'failing-hooks' failed: RuntimeError: x.y does not please me",
    )
    assert said["outrider_after_step"][0] == 3
    assert "SystemExit: 5" in said["outrider_after_step"][1]
    assert "a str" in said["outrider_classify_failure"][1]
    assert "no JSON object" in said["outrider_node_facts"][1]


def test_a_hook_that_hangs_is_left_behind() -> None:
    host, good = PluginHost(limit_s=0.2), Good()
    host.register(Hanging(), name="hangs", distribution="d", version="1")
    host.register(good, name="good", distribution="d", version="1")
    host.after_step("x.y", StepContext("r", "s"), StepOutcome(0, True))
    assert good.heard == 1
    assert "had not ended after 0.2 s" in host.failures["hangs", "outrider_after_step"].error


@pytest.mark.parametrize(
    "answer", [["gpu"], {1: 2}, {"gpu": {1, 2}}, {"gpu": float("nan")}, {"gpu": "\ud800"}, {"gpu": "x" * 100_000}, 7]
)
def test_facts_that_could_not_be_sent_are_left_out(answer: object) -> None:
    host = PluginHost()
    host.register(Facts(answer), name="odd", distribution="d", version="1")
    host.register(Facts({"disks": 2}), name="good", distribution="d", version="1")
    assert host.node_facts() == {"disks": 2}
    assert host.failures["odd", "outrider_node_facts"].count == 1


def test_of_two_plugins_that_state_one_fact_the_first_is_believed() -> None:
    host = PluginHost()
    host.register(Facts({"disks": 3}), name="a", distribution="d", version="1")
    host.register(Facts({"disks": 2, "gpu": True}), name="b", distribution="d", version="1")
    # pluggy calls the last that was bound first.
    assert host.node_facts() == {"disks": 2, "gpu": True}
    assert "another plugin says disks" in host.failures["a", "outrider_node_facts"].error


def test_a_step_type_has_its_schemas() -> None:
    host = PluginHost()

    class Plugin:
        @hookimpl
        def outrider_step_types(self) -> list[StepType]:
            return [
                StepType(name="a.b", params=Params, resolve=resolve),
                StepType(name="a.c", params=Params, outputs=Outputs, resolve=resolve),
            ]

    assert host.register(Plugin(), name="p", distribution="d", version="1").step_types == ("a.b", "a.c")
    assert host.step_types["a.b"].params_schema["type"] == "object"
    assert host.step_types["a.b"].outputs_schema == {}
    assert host.step_types["a.c"].outputs_schema["properties"].keys() == {"sizes"}
