"""Roles of nodes: what may stand in their files, what a lock may hold, and how a node is compared with both."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from outrider.errors import InvalidInput
from outrider.roles import Installed, Role, check_lock, compare, fits, load_role, read_lock

ROOT = Path(__file__).resolve().parents[2]
HASH = "--hash=sha256:" + "ab" * 32
ROLE = Role(name="game", agent=">=0.1,<0.2", plugins={"outrider-step-s3": ">=0.1,<0.2", "outrider_step.x": ""})
LOCK = {"outrider": ("0.1.3",), "outrider-step-s3": ("0.1.1",), "outrider-step-x": ("7",)}


@pytest.mark.parametrize("file", sorted((ROOT / "deploy/roles").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_roles_that_come_with_outrider_want_what_it_has(file: Path) -> None:
    role = load_role(file.read_text())
    assert role.name == file.stem
    projects = [tomllib.loads(path.read_text())["project"] for path in ROOT.glob("plugins/*/pyproject.toml")]
    versions = {project["name"]: project["version"] for project in projects}
    assert role.plugins
    for plugin, wanted in role.plugins.items():
        assert fits(versions[plugin], wanted), plugin
    import outrider

    assert fits(outrider.__version__, role.agent)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plugins: {}", "name: is missing"),
        ("name: a\nplugin: {}", "plugin: there is no such setting (did you mean plugins?)"),
        ("name: A b", "name: String should match"),
        ("name: a\nplugins: {p: '>1x'}", "'>1x' is no range of versions; it reads like '>=0.1,<0.2'"),
        ("name: a\nagent: newest", "'newest' is no range of versions"),
        ("name: a\nplugins: {'p @ https://x': ''}", "is not the name of a distribution"),
        ("name: a\nplugins: {a_b: '', a-b: ''}", "a-b is named twice"),
        ("name: a\nplugins: {outrider: ''}", "outrider itself is no plugin"),
        ("name: a\nplugins: {p: '', p: '>1'}", "line 2"),
        ("- name", "a role is a mapping"),
    ],
)
def test_a_role_that_can_not_be_meant_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_role(text)
    assert said in str(caught.value)


def test_a_lock_is_read_with_its_markers_and_comments() -> None:
    text = f"""\
# made by a person
a-b==1.0 \\
    {HASH} \\
    {HASH}
C_d==2.0.post1 ; python_full_version >= '3.12' {HASH}
c.d==1.9 ; python_full_version < '3.12' {HASH}   # older Pythons
"""
    assert read_lock(text) == {"a-b": ("1.0",), "c-d": ("2.0.post1", "1.9")}


@pytest.mark.parametrize(
    "line",
    [
        "a==1.0",
        f"a>=1.0 {HASH}",
        f"a {HASH}",
        f"a==1.*  {HASH}",
        f"a @ https://example.com/a.whl {HASH}",
        "a==1.0 --hash=md5:00",
        "--index-url https://example.com/simple",
        f"a==1.0 {HASH} --index-url=https://example.com",
        "-e .",
        "-r other.txt",
        "./a.whl",
    ],
)
def test_a_lock_says_what_is_installed_and_never_from_where(line: str) -> None:
    with pytest.raises(InvalidInput, match="line 2 of the lock"):
        read_lock(f"b==1 {HASH}\n{line}\n")


@given(st.text(max_size=200))
def test_whatever_a_lock_holds_it_is_read_or_refused(text: str) -> None:
    try:
        found = read_lock(text)
    except InvalidInput:
        return
    assert all(versions for versions in found.values())


def test_a_lock_that_does_not_fit_its_role_is_refused_with_each_difference() -> None:
    check_lock(ROLE, LOCK)
    with pytest.raises(InvalidInput) as caught:
        check_lock(ROLE, {"outrider": ("0.2",), "outrider-step-x": ("1",)})
    assert "agent: the lock has outrider 0.2, and the role wants >=0.1,<0.2" in str(caught.value)
    assert "plugins.outrider-step-s3: the lock has no outrider-step-s3" in str(caught.value)


def test_every_kind_of_drift_is_told_apart() -> None:
    def drifts(*there: Installed) -> dict[str, str]:
        return {each.distribution: each.drift for each in compare(ROLE, LOCK, there)}

    well = [Installed("outrider", "0.1.3"), Installed("outrider_step_s3", "0.1.1"), Installed("Outrider-Step-X", "7")]
    assert set(drifts(*well).values()) == {""}
    assert drifts(well[0], well[2])["outrider-step-s3"] == "missing"
    assert drifts(*well[:1], Installed("outrider-step-s3", "0.2"), well[2])["outrider-step-s3"] == "version"
    assert drifts(*well[:1], Installed("outrider-step-s3", "0.1.9"), well[2])["outrider-step-s3"] == "lock"
    assert drifts(*well[:2], Installed("outrider-step-x", "7", "boom"))["outrider-step-x"] == "broken"
    assert drifts(*well[:2], Installed("outrider-step-x", "7", disabled="by name"))["outrider-step-x"] == "disabled"
    assert drifts(*well, Installed("outrider-step-http", "1"))["outrider-step-http"] == "extra"
    assert drifts(*well, Installed("outrider_step_torn-1.0", "", "torn"))["outrider-step-torn-1-0"] == "broken"
    assert set(drifts(*well, Installed("outrider-step-http", "", disabled="named")).values()) == {""}
    assert drifts(Installed("outrider", "not a version"))["outrider"] == "version"


@pytest.mark.parametrize(
    "second", [Installed("outrider-step-x", "7", "boom"), Installed("Outrider.Step.X", "7", "", "off")]
)
def test_of_a_distribution_with_two_plugins_the_one_that_is_not_well_counts(second: Installed) -> None:
    others = [Installed("outrider", "0.1.3"), Installed("outrider-step-s3", "0.1.1")]
    well = Installed("outrider-step-x", "7")
    for there in ([well, second], [second, well]):
        drift = {each.distribution: each.drift for each in compare(ROLE, LOCK, [*others, *there])}
        assert drift["outrider-step-x"] == ("broken" if second.error else "disabled")
    both = [Installed("outrider-step-x", "7", disabled="off"), Installed("outrider-step-x", "7", "boom")]
    assert [each.drift for each in compare(ROLE, LOCK, [*others, *both])] == ["", "", "broken"]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_a_version_fits_a_range_as_packaging_says(major: int, low: int, high: int) -> None:
    assert fits(f"{major}.1", f">={low},<{high}") == SpecifierSet(f">={low},<{high}").contains(f"{major}.1")
