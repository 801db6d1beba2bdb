"""docs/promises.md and the suite say the same: what the page names exists, and no fault test is left out of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/promises.md"
TOKEN = re.compile(r"`(tests/[\w/]+\.py)`|`(test_\w+)`")
PROMISES = (
    "An acknowledged run is never lost",
    "Nothing runs twice",
    "A running container outlives the agent",
    "A lost connection changes nothing on the node",
    "The newest session wins",
    "Unknown is not failed",
    "Every log byte of a step arrives once",
    "Cancel is durable",
    "Clocks are not trusted",
    "One run at a time per object",
)


def sections() -> dict[str, str]:
    """The page's sections by heading."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(text: str) -> list[tuple[str, str]]:
    """(file, test) of each test that ``text`` names: a test belongs to the file that was named last before it."""
    found, file = [], ""
    for path, test in TOKEN.findall(text):
        if path:
            file = path
        else:
            found.append((file, test))
    return found


def functions_of(file: Path) -> set[str]:
    """The names of all test functions in ``file``."""
    tree = ast.parse(file.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name for node in functions if node.name.startswith("test_")}


def test_every_test_that_the_page_names_exists() -> None:
    missing = []
    known: dict[str, set[str]] = {}
    for file, test in named(PAGE.read_text()):
        if file not in known:
            known[file] = functions_of(ROOT / file) if (ROOT / file).is_file() else set()
        if test not in known[file]:
            missing.append(f"{file}: {test}")
    assert known
    assert not missing, "docs/promises.md names tests that are not there"


def test_every_fault_test_is_on_the_page() -> None:
    on_page = set(named(PAGE.read_text()))
    missing = [
        f"{path.relative_to(ROOT)}: {test}"
        for folder in ("tests/faults", "tests/model")
        for path in sorted((ROOT / folder).glob("test_*.py"))
        for test in sorted(functions_of(path))
        if (path.relative_to(ROOT).as_posix(), test) not in on_page
    ]
    assert not missing, "say in docs/promises.md what these prove"


@pytest.mark.parametrize("number", range(1, len(PROMISES) + 1))
def test_each_promise_has_its_proof_and_its_limits(number: int) -> None:
    heading = next((each for each in sections() if each.startswith(f"{number}. ")), "")
    assert heading.startswith(f"{number}. {PROMISES[number - 1]}")
    text = sections()[heading]
    assert named(text), f"no test proves {heading!r}"
    assert re.search(r"^Not promised: \S", text, re.MULTILINE), f"{heading!r} does not say what is not promised"


def test_the_last_results_of_the_long_forms_are_there_in_numbers() -> None:
    text = sections()["Last results"]
    for word in ("kills", "cuts", "runs", "lost", "twice", "make soak", "make model", "make faults"):
        assert word in text, f"the last results do not tell {word!r}"
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| `make .*$", text, re.MULTILINE)
    ]
    assert {row[0].strip("`").split()[1] for row in rows} == {"soak", "faults", "model"}
    for row in rows:
        assert all(re.fullmatch(r"[\d,]+", row[column]) for column in (2, 4, 5, 6)), f"a result without numbers: {row}"
