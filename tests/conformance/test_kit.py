"""The conformance kit: a plugin that keeps every promise passes, each bad one fails the one check that it is for."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from outrider.testing import StepConformance

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent

needs_base = pytest.mark.skipif(
    subprocess.run(["docker", "image", "inspect", "outrider/base:1"], capture_output=True).returncode != 0,
    reason="the image outrider/base:1 is not built (make images)",
)

SUITE = """
from outrider.testing import Example, Failing, StepConformance, Wrong

IO = {"of": "/data/text", "to": "/data/words"}
RW = {"data": "/data:rw"}


def lines(done):
    assert (done.volumes["data"] / "words").read_text() == "a\\nb\\nc\\n"


class Words(StepConformance):
    step_type = "words.split"
    examples = [
        Example(
            "three words", IO, volumes=RW, files={"data/text": "a b c"}, outputs={"words": 3},
            secrets={"WORDS_TOKEN": "kJ7sd9-Ahq3x"}, check=lines,
        )
    ]
    failing = [Failing("no file", IO, volumes=RW, code="no_file", says="/data/text")]
    wrong = [Wrong("relative path", IO | {"of": "text"}, volumes=RW, says="with.of")]
    long = Example("slow", IO | {"pause_s": 0.5}, volumes=RW, files={"data/text": "a b c d e f g h"})
    grace_s = 3.0
"""
CASE = """

class Test_{module}(Words):
    plugin = "{module}"
"""

STATIC = {
    "not_loaded": "test_plugin_is_usable",
    "invalid_schema": "test_schemas_are_exported",
    "open_schema": "test_schemas_are_exported",
    "open_outputs": "test_schemas_are_exported",
    "open_within": "test_schemas_are_exported",
    "refuses_its_example": "test_example_is_accepted",
    "reads_a_file": "test_resolve_is_pure",
    "reads_in_a_thread": "test_resolve_is_pure",
    "reads_the_clock": "test_resolve_is_pure",
    "reads_a_clock_by_its_number": "test_resolve_is_pure",
    "depends_on_the_process": "test_resolve_is_deterministic",
    "password_parameter": "test_plan_holds_no_secret",
    "password_within": "test_plan_holds_no_secret",
    "secret_in_arguments": "test_plan_holds_no_secret",
    "latest_image": "test_image_is_named_exactly",
    "takes_anything": "test_wrong_parameters_are_refused",
    "breaks_at_odd_values": "test_odd_parameters_break_nothing",
}
RUNNING = {
    "needs_a_writable_root": "test_example_works_in_the_sandbox",
    "needs_root": "test_example_works_in_the_sandbox",
    "needs_a_capability": "test_example_works_in_the_sandbox",
    "undeclared_output": "test_outputs_are_as_promised",
    "progress_in_prose": "test_progress_is_told",
    "progress_goes_back": "test_progress_is_told",
    "tells_no_progress": "test_progress_is_told",
    "tells_a_secret": "test_secrets_are_not_told",
    "secret_to_a_process": "test_secrets_are_not_told",
    "fails_without_a_word": "test_failure_is_told",
    "temporary_for_ever": "test_failure_is_told",
    "deaf": "test_cancel_is_obeyed",
    "leaves_half": "test_cancel_leaves_nothing_half_done",
    "not_repeatable": "test_can_be_repeated",
    "leaves_a_lock": "test_killed_attempt_can_be_repeated",
}


def outcome(
    pytester: pytest.Pytester, modules: Iterable[str], *options: str, more: str = ""
) -> tuple[dict[str, set[str]], str]:
    """The checks that each plugin fails, and the report. ``more`` stands in the last plugin's class."""
    pytester.makepyfile(SUITE + "".join(CASE.format(module=module) for module in modules) + more)
    for folder in (HERE, HERE / "bad"):
        pytester.syspathinsert(folder)
    quiet = ("-q", "-rf", "-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error")
    report = pytester.runpytest_inprocess(*quiet, *options).stdout.str()
    failed: dict[str, set[str]] = {}
    for module, check in re.findall(r"^FAILED .*::Test_(\w+)::(\w+)", report, re.MULTILINE):
        failed.setdefault(module, set()).add(check)
    return failed, report


def test_every_bad_plugin_is_in_the_table() -> None:
    assert {path.stem for path in (HERE / "bad").glob("*.py")} == {*STATIC, *RUNNING}


def test_every_check_is_shown_to_fail() -> None:
    checks = {name for name in vars(StepConformance) if name.startswith("test_")}
    given = {"test_kit_has_what_it_needs"}  # of the class, not of the plugin
    assert checks == {*STATIC.values(), *RUNNING.values(), *given}


@needs_base
def test_plugin_that_keeps_its_promises_passes(pytester: pytest.Pytester) -> None:
    failed, report = outcome(pytester, ["words"], "--outrider-engine=require")
    assert failed == {}, report
    assert "19 passed" in report


@needs_base
def test_what_was_whole_when_the_step_was_cancelled_is_not_half_done(pytester: pytest.Pytester) -> None:
    options = ("--outrider-engine=require", "-k", "test_cancel")
    failed, report = outcome(pytester, ["publishes_early"], *options, more='    until = "published"\n')
    assert failed == {}, report
    assert "2 passed, 17 deselected" in report


def test_bad_modules_fail_their_check_and_no_other(pytester: pytest.Pytester) -> None:
    failed, report = outcome(pytester, STATIC, "--outrider-engine=off")
    assert failed == {module: {check} for module, check in STATIC.items()}, report


@needs_base
def test_bad_programs_fail_their_check(pytester: pytest.Pytester) -> None:
    chosen = " or ".join(f"(Test_{module} and {check})" for module, check in RUNNING.items())
    failed, report = outcome(pytester, RUNNING, "--outrider-engine=require", "-k", chosen)
    assert failed == {module: {check} for module, check in RUNNING.items()}, report


@needs_base
@pytest.mark.long
@pytest.mark.timeout(900)
def test_bad_programs_fail_no_other_check(pytester: pytest.Pytester) -> None:
    failed, report = outcome(pytester, RUNNING, "--outrider-engine=require")
    # What never works, or never says that it is in its middle, can't be cancelled in that or repeated, either.
    for module in (
        "needs_a_writable_root",
        "needs_root",
        "needs_a_capability",
        "undeclared_output",
        "tells_no_progress",
    ):
        assert RUNNING[module] in failed[module], report
        failed[module] = {RUNNING[module]}
    assert failed == {module: {check} for module, check in RUNNING.items()}, report


def test_class_that_gives_too_little_is_told_so(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "from outrider.testing import StepConformance\nclass TestIt(StepConformance):\n    step_type = 'words.split'"
    )
    report = pytester.runpytest_inprocess("-q", "-p", "no:asyncio", "--outrider-engine=off").stdout.str()
    assert "TestIt.examples is empty: give at least one" in report
    assert "there is no step type 'words.split'" in report
