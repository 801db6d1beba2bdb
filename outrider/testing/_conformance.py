"""The checks. A subclass names a step type and gives examples; each method here is one promise of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import pytest

from outrider.errors import OutriderError
from outrider.masking import contains_secret
from outrider.steps import EXIT_TEMPORARY
from outrider.testing import _checks as checks
from outrider.testing._examples import Example, Failing, Wrong

if TYPE_CHECKING:
    from agent_core.policy import NodePolicy
    from outrider.testing._subject import StepUnderTest

_KILLED = 137


class StepConformance:
    """Subclass it once for each step type, with a name that pytest collects (``class TestManifestCreate``).

    Where parameters are known only when the tests run (the address of a server that they start), a fixture
    ``step_environment`` of the module (scope "module") makes what functions in place of mappings get.
    """

    is_step_conformance: ClassVar[bool] = True

    step_type: ClassVar[str] = ""
    """What ``uses:`` names."""
    plugin: ClassVar[str] = ""
    """The module of the plugin, to test it as it is; "": the one that is installed."""
    folder: ClassVar[Path | None] = None
    """The project whose image/Dockerfile makes the image, which is built first where it is not up to date; None: the
    directory that pytest was started for, if it has one."""
    examples: ClassVar[Sequence[Example]] = ()
    """Uses that work; at least one."""
    failing: ClassVar[Sequence[Failing]] = ()
    """Uses that can't be done; at least one."""
    wrong: ClassVar[Sequence[Wrong]] = ()
    """Parameters that are refused; at least one."""
    long: ClassVar[Example | None] = None
    """A use that takes some seconds: it is cancelled and killed in its middle."""
    until: ClassVar[str] = "progress"
    """When ``long`` is in its middle: at its first word of progress, or when this text stands in its log."""
    quick: ClassVar[str] = ""
    """In place of ``long``: why no use takes long enough to be cancelled."""
    throttle: ClassVar[float | None] = None
    """How many CPUs ``long`` gets until it is cancelled or killed: 0.05 makes a quick program a slow one."""
    progress: ClassVar[bool] = True
    """Whether the program tells how far it is."""
    grace_s: ClassVar[float] = 10.0
    """How long after the stop signal the program may take, in seconds; the node's default."""
    policy: ClassVar[NodePolicy | Mapping[str, Any] | None] = None
    """What the node allows, as in its policy file; None: its defaults."""

    # -- what the module says

    def test_kit_has_what_it_needs(self) -> None:
        """The class gives an example, a failing one, wrong parameters, and a long example or the reason for none."""
        for name, given in (("examples", self.examples), ("failing", self.failing), ("wrong", self.wrong)):
            if not given:
                _fail(f"{type(self).__name__}.{name} is empty: give at least one")
        if self.long is None and not self.quick:
            _fail(f"{type(self).__name__} has neither `long`, an example to cancel, nor `quick`, why there is none")

    def test_plugin_is_usable(self, outrider_step: StepUnderTest) -> None:
        """An agent would load the plugin, and finds the step type in it."""
        if outrider_step.subject.problem:
            _fail(outrider_step.subject.problem)

    def test_schemas_are_exported(self, outrider_step: StepUnderTest) -> None:
        """Parameters and outputs have JSON Schemas that the server can check with, and refuse what they don't know."""
        _none(checks.schema_problems(outrider_step.subject))

    def test_example_is_accepted(self, outrider_step: StepUnderTest, example: Example) -> None:
        """The parameters of the example fit schema, model, volumes and the node's policy."""
        try:
            outrider_step.accept(example)
        except OutriderError as error:
            _fail(f"the example is refused: {error}")

    def test_resolve_is_pure(self, outrider_step: StepUnderTest, example: Example) -> None:
        """No I/O, no thread, no clock, no randomness, no environment; and what it is given stays as it was."""
        _none(checks.impurities(outrider_step.subject, *outrider_step.given(example)))

    def test_resolve_is_deterministic(self, outrider_step: StepUnderTest, example: Example) -> None:
        """The same parameters make the same plan, also in another process, home, time zone and directory."""
        _none(checks.differences(outrider_step.subject, *outrider_step.given(example)))

    def test_plan_holds_no_secret(self, outrider_step: StepUnderTest, example: Example) -> None:
        """Secrets are envs that the pipeline allots, not parameters, and none gets into arguments or the plan's env."""
        _none(checks.secret_parameters(outrider_step.subject))
        _none(checks.secrets_in_plan(outrider_step.subject, *outrider_step.given(example)))

    def test_image_is_named_exactly(self, outrider_step: StepUnderTest, example: Example) -> None:
        """The image has a tag other than ``latest``, or a digest: the same plan always means the same program."""
        _none(checks.image_problems(outrider_step.planned(example).plan.image))

    def test_wrong_parameters_are_refused(self, outrider_step: StepUnderTest, wrong_example: Wrong) -> None:
        """Before anything runs, with a sentence."""
        said = outrider_step.refusal(wrong_example)
        if said is None:
            _fail("these parameters are accepted, and should be refused")
        if wrong_example.says not in said:
            _fail(f"they are refused, but it is not said that {wrong_example.says!r}: {said}")

    def test_odd_parameters_break_nothing(self, outrider_step: StepUnderTest, example: Example) -> None:
        """Whatever is given for a parameter, model and resolve take it or refuse it, and never crash."""
        _, context = outrider_step.given(example)
        _none(checks.crashes(outrider_step.subject, outrider_step.params(example), context))

    # -- what the program does, in the sandbox

    def test_example_works_in_the_sandbox(self, outrider_step: StepUnderTest, example: Example) -> None:
        """Read-only root, no capabilities, a user that nobody knows: the program ends with 0 and did what it should."""
        attempted = outrider_step.attempt(example)
        result = attempted.result
        if result.exit_code != 0:
            _fail(f"it is {result.state}: {result.message} {result.hint}\n{attempted.log}")
        if example.check is not None:
            example.check(attempted)

    def test_outputs_are_as_promised(self, outrider_step: StepUnderTest, example: Example) -> None:
        """What the program gives back fits the outputs model, and is what the example says."""
        result = outrider_step.attempt(example).result
        if result.exit_code == 0 and result.state != "succeeded":
            _fail(f"{result.message} {result.hint}")
        if result.state == "succeeded":
            for name, expected in outrider_step.outputs(example).items():
                given = result.outputs.get(name)
                if name not in result.outputs or given != expected:
                    _fail(f"the output {name} is {given!r} and should be {expected!r}")

    def test_progress_is_told(self, outrider_step: StepUnderTest, example: Example) -> None:
        """Lines of JSON with ``done``, ``total`` and ``unit``, that never go back."""
        result = outrider_step.attempt(example).result
        _none(checks.progress_problems(result.progress, wanted=self.progress and result.exit_code == 0))

    def test_secrets_are_not_told(self, outrider_step: StepUnderTest, example: Example) -> None:
        """No secret in the log, the outputs, the progress or the arguments of a process, before anything is masked."""
        secrets = outrider_step.secrets(example)
        if not secrets:
            pytest.skip("the example has no secrets")
        attempted = outrider_step.attempt(example)
        result = attempted.result
        for what, data in (
            ("its log", result.stdout + b"\n" + result.stderr),
            ("its outputs", result.outputs_file),
            ("its progress", result.progress),
        ):
            if contains_secret(data, secrets):
                _fail(f"{what} has a secret in it")
        if attempted.secret_arguments:
            _fail("a secret stands in the arguments of a process, where every user of the node can see it")

    def test_failure_is_told(self, outrider_step: StepUnderTest, failing_example: Failing) -> None:
        """A cause in one sentence with a code; exit code 75 where it may work when tried again, another otherwise."""
        attempted = outrider_step.attempt(failing_example)
        result = attempted.result
        if result.exit_code is None:
            _fail(f"the program did not run: {result.message} {result.hint}")
        if (result.exit_code == EXIT_TEMPORARY) is not failing_example.temporary or result.exit_code == 0:
            wanted = f"{EXIT_TEMPORARY}" if failing_example.temporary else f"neither 0 nor {EXIT_TEMPORARY}"
            _fail(f"the exit code is {result.exit_code}, and should be {wanted}\n{attempted.log}")
        for problem in checks.cause_problems(result.progress, failing_example.code, failing_example.says):
            _fail(f"{problem}\n{attempted.log}")

    def test_cancel_is_obeyed(self, outrider_step: StepUnderTest) -> None:
        """SIGTERM ends the program within the grace, before it has to be killed."""
        result, took_s, _ = outrider_step.cancelled()
        if result.exit_code == _KILLED:
            _fail(f"it did not end within {self.grace_s:g} s of SIGTERM and was killed (after {took_s:.1f} s)")
        if result.state != "cancelled":
            _fail(f"it was cancelled and ended as {result.state}: {result.message}")

    def test_cancel_leaves_nothing_half_done(self, outrider_step: StepUnderTest) -> None:
        """What the parameters say is written is there whole or not at all, also after a cancel."""
        _, _, changed = outrider_step.cancelled()
        for path in changed:
            _fail(f"the cancelled step left something at {path}; write beside it and rename what is finished")

    def test_can_be_repeated(self, outrider_step: StepUnderTest, example: Example) -> None:
        """Declared idempotent: done again on what it has left, it succeeds, with the same outputs and files."""
        outrider_step.skip_unless_idempotent()
        first = outrider_step.attempt(example)
        before = checks.tree(first.volumes)
        again = outrider_step.repeat(example)
        if again.state != "succeeded":
            _fail(f"done again it is {again.state}: {again.message} {again.hint}")
        for name in first.outputs:
            if name not in example.varying and again.outputs.get(name) != first.outputs[name]:
                _fail(f"done again, the output {name} is {again.outputs.get(name)!r}, and was {first.outputs[name]!r}")
        for path in checks.changes(before, checks.tree(first.volumes)):
            if path not in example.varying:
                _fail(f"done again, {path} is another")

    def test_killed_attempt_can_be_repeated(self, outrider_step: StepUnderTest) -> None:
        """Declared idempotent: after it was killed in its middle, it can be done again, and succeeds."""
        outrider_step.skip_unless_idempotent()
        again = outrider_step.killed_and_repeated()
        if again.state != "succeeded":
            _fail(f"killed and tried again it is {again.state}: {again.message} {again.hint}")


def _none(problems: Any) -> None:
    for problem in problems:
        _fail(problem)


def _fail(sentence: str) -> NoReturn:
    pytest.fail(sentence.rstrip(), pytrace=False)
