"""Where the images of step plugins are described: in the checkout, in folders, and in the distributions installed here.

A plugin's folder has ``image/Dockerfile`` and mostly ``program/``. An installed distribution carries both beneath its
module, in ``_context``; one that is installed in editable mode is found through its source tree. Nothing of a plugin is
imported for it: a plugin that is broken has an image all the same.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from outrider.cli.imagebuild.images import StepImage, Workshop
from outrider.cli.imagebuild.shell import BuildError

GROUP = "outrider.steps"
CONTEXT = "_context"
"""Beneath a plugin's module: what its image is made of, where the distribution is installed from a wheel."""

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_REPOSITORY = re.compile(r"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Installed:
    """The images of the plugins that are installed here. ``without``: plugins that carry none, as "name (dist)"."""

    steps: list[StepImage]
    without: list[str]


def of_checkout(root: Path, extra: Iterable[Path] = ()) -> Workshop:
    """The workshop of the checkout ``root`` and of the plugins in the folders ``extra``."""
    folders = sorted(path.parent.parent for path in root.glob("plugins/*/image/Dockerfile"))
    steps = [of_folder(folder) for folder in (*folders, *extra)]
    return Workshop(steps, scratch=root / ".build" / "images", stepkit=root / "stepkit" / "outrider_stepkit")


def of_machine(extra: Iterable[Path] = ()) -> tuple[Workshop, list[str]]:
    """The workshop of the plugins that are installed here and of those in ``extra``; and who carries no image."""
    found = installed()
    given = [of_folder(folder) for folder in extra]
    tags = {step.tag for step in given}
    steps = [*(step for step in found.steps if step.tag not in tags), *given]
    return Workshop(steps, scratch=cache(), stepkit=stepkit()), found.without


def build_plugin(folder: Path) -> str:
    """Build the image of the plugin in ``folder`` if it is not up to date; its tag. Raises BuildError."""
    step = of_folder(folder)
    workshop = Workshop([step], scratch=cache(), stepkit=stepkit())
    workshop.build([step.name], base_choice="auto", mirror="", refresh=False)
    return step.tag


def of_folder(folder: Path) -> StepImage:
    """The image of the plugin whose source tree is ``folder``: named by its entry point, tagged with its version."""
    project = folder / "pyproject.toml"
    if not (folder / "image" / "Dockerfile").exists():
        raise BuildError(f"{folder} has no image/Dockerfile, so it is not the folder of a step plugin")
    try:
        document = tomllib.loads(project.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"{project} can't be read: {error}") from error
    version = document.get("project", {}).get("version")
    if not isinstance(version, str):
        raise BuildError(f'{project} has no version = "…" in [project], which the image\'s tag is made of')
    names = document["project"].get("entry-points", {}).get(GROUP, {})
    return _image(next(iter(names), folder.resolve().name), version, folder)


def installed() -> Installed:
    """What the distributions with entry points for steps carry."""
    steps: dict[Path, StepImage] = {}
    without = []
    for entry_point in sorted(entry_points(group=GROUP), key=lambda each: each.name):
        folder = _folder_of(entry_point)
        if folder is None:
            without.append(f"{entry_point.name} ({entry_point.dist.name if entry_point.dist else entry_point.value})")
        elif folder not in steps:
            if folder.name == CONTEXT:
                assert entry_point.dist is not None
                steps[folder] = _image(entry_point.name, entry_point.dist.version, folder)
            else:
                steps[folder] = of_folder(folder)
    return Installed(list(steps.values()), without)


def stepkit() -> Path:
    """The package outrider_stepkit as it is installed here."""
    spec = importlib.util.find_spec("outrider_stepkit")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("step images contain the step kit, which is not installed here: pip install outrider-stepkit")
    return Path(spec.submodule_search_locations[0])


def cache() -> Path:
    """Where an installed Outrider keeps what it fetched for images (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "outrider" / "images"


def _folder_of(entry_point: EntryPoint) -> Path | None:
    # The top package alone: finding one beneath it would import it.
    spec = importlib.util.find_spec(entry_point.module.partition(".")[0])
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    if (package / CONTEXT / "image" / "Dockerfile").exists():
        return package / CONTEXT
    for folder in (package.parent, package.parent.parent):
        if (folder / "image" / "Dockerfile").exists() and (folder / "pyproject.toml").exists():
            return folder
    return None


def _image(name: str, version: str, folder: Path) -> StepImage:
    if not _NAME.fullmatch(name):
        raise BuildError(f"the plugin {name!r} can't be part of an image's name: lower-case letters, digits, . _ -")
    repository = f"outrider/step-{name}"
    file = folder / "image" / "repository"
    if file.exists():
        repository = file.read_text(encoding="utf-8").strip()
        if not _REPOSITORY.fullmatch(repository):
            raise BuildError(f"{file}: {repository!r} is not an image's name without a tag, like ghcr.io/acme/step-x")
    return StepImage(name, f"{repository}:{version.replace('+', '-')}", folder)
