"""The project that `outrider plugin new` makes: templates, and the names that are put into them."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path

from outrider.errors import Conflict, InvalidInput

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_EVERYWHERE = {
    "pyproject.toml": "all/pyproject.toml.in",
    "README.md": "all/README.md.in",
    ".gitignore": "all/gitignore.in",
    ".github/workflows/ci.yml": "all/ci.yml.in",
    "examples/list.yaml": "all/list.yaml.in",
    "examples/pipeline.yaml": "all/pipeline.yaml.in",
    "tests/test_conformance.py": "all/test_conformance.py.in",
    "@MODULE@/py.typed": "",
}
_OF_LANGUAGE = {
    "python": {
        "@MODULE@/__init__.py": "python/module.py.in",
        "program/__main__.py": "python/program.py.in",
        "image/Dockerfile": "python/Dockerfile.in",
    },
    "sh": {
        "@MODULE@/__init__.py": "sh/module.py.in",
        "program/main.sh": "sh/program.sh.in",
        "image/Dockerfile": "sh/Dockerfile.in",
    },
}


def make(name: str, folder: Path | None, language: str) -> tuple[Path, list[str]]:
    """Write the project; gives its folder and its files.

    Raises InvalidInput for a name that step types can't have, Conflict if there is something in the folder already.
    """
    check_name(name)
    folder = folder or Path(f"outrider-step-{name.replace('_', '-')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder} is there already, and not empty", hint="give another one with --directory")
    texts = render(name, language)
    try:
        for path, text in texts.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{error.filename or folder} can't be written: {error.strerror}") from error
    return folder, sorted(texts)


def render(name: str, language: str) -> dict[str, str]:
    """The files of the project: path to text."""
    values = {
        "@NAME@": name,
        "@MODULE@": f"outrider_step_{name}",
        "@DISTRIBUTION@": f"outrider-step-{name.replace('_', '-')}",
    }
    root = files("outrider.cli") / "scaffold"
    made = {}
    for path, template in (_EVERYWHERE | _OF_LANGUAGE[language]).items():
        text = (root / template).read_text(encoding="utf-8") if template else ""
        made[_filled(path, values)] = _filled(text, values)
    return made


def check_name(name: str) -> None:
    """Raises InvalidInput unless step types can be called ``NAME.…`` and nobody else's are."""
    from outrider.schema import KNOWN_DISTRIBUTIONS

    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("outrider-step-")).strip("_")
        near = f", such as {plain}" if _NAME.fullmatch(plain) and not keyword.iskeyword(plain) else ""
        raise InvalidInput(
            f"{name!r} can't be the name of a step plugin", hint=f"lower-case letters, digits and _{near}"
        )
    if name in KNOWN_DISTRIBUTIONS:
        raise InvalidInput(f"{name!r} is the plugin of {KNOWN_DISTRIBUTIONS[name]}", hint="choose another name")


def _filled(text: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text
