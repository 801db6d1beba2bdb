"""The step type of one conformance class, and what was done with it: an example is carried out once for all checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from agent_core.onestep import GivenVolume, StepRequest
from agent_core.planning import PlannedStep
from agent_core.policy import NodePolicy
from agent_core.trial import StepResult
from outrider.errors import OutriderError
from outrider.steps import StepContext
from outrider.testing import _checks as checks
from outrider.testing._bench import Begun, Bench, arguments_of_processes, make_volumes
from outrider.testing._examples import Attempted, Example, Values, Wrong, values

if TYPE_CHECKING:
    from outrider.testing._conformance import StepConformance


class StepUnderTest:
    """What the checks of one class share."""

    def __init__(
        self,
        suite: type[StepConformance],
        environment: Any,
        bench: Callable[[str, NodePolicy], Bench],
        folder: Callable[[str], Path],
    ) -> None:
        """``bench`` gives the place to carry steps out in, ``folder`` a new directory."""
        self._suite = suite
        self._environment = environment
        self._get_bench = bench
        self._fresh = folder
        given = suite.policy
        self._policy = given if isinstance(given, NodePolicy) else NodePolicy.model_validate(given or {})
        self._folders: dict[str, Path] = {}
        self._attempts: dict[str, Attempted] = {}
        self._cancelled: tuple[StepResult, float, list[str]] | None = None
        self.subject = checks.load(suite.plugin, suite.step_type)

    # -- what is given

    def params(self, example: Example) -> dict[str, Any]:
        """The parameters of an example."""
        return values(example.params, self._environment)

    def outputs(self, example: Example) -> dict[str, Any]:
        """What the example must at least give back."""
        return values(example.outputs, self._environment)

    def secrets(self, example: Example) -> tuple[str, ...]:
        """The values that must turn up nowhere."""
        return tuple(str(value) for value in values(example.secrets, self._environment).values())

    def accept(self, example: Example) -> PlannedStep:
        """The plan, made as on a node. Raises OutriderError with the node's sentence if there is none."""
        envs = values(example.envs, self._environment) | values(example.secrets, self._environment)
        request = self._request(example.params, _mounted(example.volumes), envs=envs, object_ref=example.object)
        return checks.plan(self.subject, request, self._policy)

    def planned(self, example: Example) -> PlannedStep:
        """The plan; the check is skipped if there is none, which another check says."""
        try:
            return self.accept(example)
        except OutriderError:
            pytest.skip("the example is refused; see test_example_is_accepted")

    def given(self, example: Example) -> tuple[BaseModel, StepContext]:
        """What resolve gets."""
        planned = self.planned(example)
        return self.subject.usable.params.model_validate(self.params(example)), planned.context

    def refusal(self, wrong: Wrong) -> str | None:
        """The sentence with which parameters are refused; None if they are not."""
        return checks.refusal(self.subject, self._request(wrong.params, _mounted(wrong.volumes)), self._policy)

    # -- what is done

    def attempt(self, example: Example) -> Attempted:
        """The example, carried out; once, whoever asks."""
        if example.name not in self._attempts:
            self._folders[example.name] = self._fresh("example")
            request = self._request_in(self._folders[example.name], example, make=True)
            bench = self._bench
            self._prepare(example, request)
            began = time.monotonic()
            with arguments_of_processes(self.secrets(example)) as seen:
                result = bench.run(request)
            took_s = time.monotonic() - began
            self._attempts[example.name] = Attempted(result, _directories(request), took_s, secret_arguments=bool(seen))
        return self._attempts[example.name]

    def repeat(self, example: Example) -> StepResult:
        """The example once more, on what it has left."""
        return self._bench.run(self._request_in(self._folders[example.name], example))

    def cancelled(self) -> tuple[StepResult, float, list[str]]:
        """The long example, cancelled in its middle: how it ended, after how long, and what it has left half-done."""
        long, suite = self._long(), self._suite
        if self._cancelled is None:
            request = self._request_in(self._fresh("cancelled"), long, make=True, cpus=suite.throttle)
            before = checks.tree(_directories(request))
            self._prepare(long, request)
            with self._bench.begun(request) as begun:
                self._middle(begun)
                began = time.monotonic()
                begun.cancel(suite.grace_s)
                result = begun.end()
                took_s = time.monotonic() - began
            after = checks.tree(_directories(request))
            written = checks.written_paths(self.subject, dict(request.params), request.volumes)
            changed = checks.changes(before, after, within=written)
            if changed and self._is_whole(long, after, written):
                changed = []  # what it writes was there whole already when the signal came
            self._cancelled = (result, took_s, changed)
        return self._cancelled

    def killed_and_repeated(self) -> StepResult:
        """The long example, killed in its middle and done again."""
        long = self._long()
        request = self._request_in(self._fresh("killed"), long, make=True)
        self._prepare(long, request)
        with self._bench.begun(replace(request, cpus=self._suite.throttle)) as begun:
            self._middle(begun)
            try:
                begun.kill()
            except OutriderError as error:
                ended = begun.end()
                pytest.fail(
                    f"the long example was over before it could be killed ({error.message}): it is {ended.state}: "
                    f"{ended.message}",
                    pytrace=False,
                )
            begun.end()
        return self._bench.run(request)

    def skip_unless_idempotent(self) -> None:
        """Only what is declared idempotent has to be repeatable."""
        if not self.subject.usable.idempotent:
            pytest.skip("the step type is not declared idempotent")

    # -- inside

    @property
    def _bench(self) -> Bench:
        self.subject.usable  # noqa: B018 - skips
        return self._get_bench(self._suite.plugin, self._policy)

    def _prepare(self, example: Example, request: StepRequest) -> None:
        """Carry out what has to be done before the example."""
        for step_type, params in example.before:
            first = replace(request, uses=step_type, params=values(params, self._environment), cpus=None)
            result = self._bench.run(first)
            if result.state != "succeeded":
                pytest.fail(f"{step_type}, which comes before, is {result.state}: {result.message}", pytrace=False)

    def _is_whole(self, example: Example, found: Mapping[str, str], written: Sequence[str]) -> bool:
        """Whether ``found`` is what ``example`` leaves when it is not disturbed."""
        request = self._request_in(self._fresh("whole"), example, make=True)
        self._prepare(example, request)
        ended = self._bench.run(request)
        whole = checks.tree(_directories(request))
        others = [path for path in checks.changes(whole, found, within=written) if path not in example.varying]
        return ended.state == "succeeded" and not others

    def _long(self) -> Example:
        if self._suite.long is None:
            pytest.skip(f"there is no long example: {self._suite.quick}")
        return self._suite.long

    def _middle(self, begun: Begun) -> None:
        until = self._suite.until
        if not begun.wait_until(until, self._long().timeout_s):
            result = begun.end()
            pytest.fail(
                f"the long example was over before it was in its middle (until = {until!r}): it is {result.state}: "
                f"{result.message}\n{(result.stdout + result.stderr).decode(errors='replace')}",
                pytrace=False,
            )

    def _request(self, params: Values, volumes: Mapping[str, GivenVolume], **more: Any) -> StepRequest:
        return StepRequest(self._suite.step_type, values(params, self._environment), volumes, **more)

    def _request_in(
        self, folder: Path, example: Example, *, make: bool = False, cpus: float | None = None
    ) -> StepRequest:
        files = values(example.files, self._environment) if make else {}
        # Not told as secrets: nothing is masked on its way, and what the program says of them can be seen.
        envs = values(example.envs, self._environment) | values(example.secrets, self._environment)
        volumes = make_volumes(folder, example.volumes, files)
        return self._request(
            example.params, volumes, envs=envs, object_ref=example.object, timeout_s=example.timeout_s, cpus=cpus
        )


def _directories(request: StepRequest) -> dict[str, Path]:
    return {name: each.directory for name, each in request.volumes.items()}


def _mounted(mounts: Mapping[str, str]) -> dict[str, GivenVolume]:
    """Volumes as a plan sees them, without directories."""
    made = {}
    for name, text in mounts.items():
        path, _, mode = text.partition(":")
        made[name] = GivenVolume(Path(), path, writable=mode == "rw")
    return made
