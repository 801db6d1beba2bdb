"""The pytest plugin: its options, its fixtures, and how the checks of a `StepConformance` are multiplied.

Loaded in every pytest session of an environment that has Outrider, so it imports nothing before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from agent_core.policy import NodePolicy
    from outrider.testing._bench import Bench
    from outrider.testing._subject import StepUnderTest

_LISTS = {"example": "examples", "failing_example": "failing", "wrong_example": "wrong"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Whether the checks that need a container engine are run."""
    parser.getgroup("outrider").addoption(
        "--outrider-engine",
        choices=("auto", "require", "off"),
        default="auto",
        help="Checks of steps that need a container engine: skip them where none answers (auto), fail then (require), "
        "or skip them always (off).",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each example of the class."""
    if not getattr(metafunc.cls, "is_step_conformance", False):
        return
    from outrider.testing._examples import slug

    for argument, attribute in _LISTS.items():
        if argument in metafunc.fixturenames:
            given = list(getattr(metafunc.cls, attribute))
            metafunc.parametrize(argument, given, ids=[slug(each.name) for each in given])


@pytest.fixture(scope="session")
def step_environment() -> Any:
    """What the examples need to be there. Override it, with the scope that suits it, to start a server, say."""
    return None


@pytest.fixture(scope="class")
def outrider_step(
    request: pytest.FixtureRequest,
    step_environment: Any,
    outrider_bench: Callable[[str, NodePolicy], Bench],
    outrider_image: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> StepUnderTest:
    """The step type of the class, and what was done with it."""
    from outrider.testing._subject import StepUnderTest

    folder = request.cls.folder or request.config.rootpath

    def bench(module: str, policy: NodePolicy) -> Bench:
        found = outrider_bench(module, policy)
        outrider_image(folder)
        return found

    return StepUnderTest(request.cls, step_environment, bench, tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def outrider_image() -> Callable[[Path], None]:
    """Builds the image of a plugin's project, where it has one that is not up to date; once in a session."""

    @cache
    def build(folder: Path) -> None:
        if not (folder / "image" / "Dockerfile").exists():
            return
        from outrider.cli.imagebuild import BuildError, build_plugin

        try:
            build_plugin(folder)
        except BuildError as error:
            pytest.fail(f"the image can't be built: {error}", pytrace=False)

    return build


@pytest.fixture(scope="session")
def outrider_bench(request: pytest.FixtureRequest) -> Iterator[Callable[[str, NodePolicy], Bench]]:
    """Gives the place where steps of a plugin are carried out; skips where there is no engine, as the option says."""
    wish = request.config.getoption("--outrider-engine")
    benches: dict[tuple[str, str], Any] = {}

    def get(module: str, policy: NodePolicy) -> Bench:
        if wish == "off":
            pytest.skip("needs a container engine, and --outrider-engine=off")
        from outrider.errors import EngineUnavailable
        from outrider.testing._bench import Bench

        key = (module, policy.model_dump_json())
        if key not in benches:
            bench = Bench(module, policy)
            try:
                bench.start()
                benches[key] = bench
            except EngineUnavailable as error:
                benches[key] = str(error)
        found = benches[key]
        if isinstance(found, str):
            if wish == "require":
                pytest.fail(found, pytrace=False)
            pytest.skip(found)
        return found  # type: ignore[no-any-return]  # what is no text is a bench

    yield get
    for each in benches.values():
        if not isinstance(each, str):
            each.close()
