"""Which images there are, what each is made of, and the building of those that are not up to date."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from outrider.cli.imagebuild import base, engine, wheels
from outrider.cli.imagebuild.shell import BuildError, Progress, UnknownImage

BASE = "outrider/base:1"
PAUSE = "outrider/pause:1"
RECIPE = "1"
"""Part of every digest: raised when the way in which images are made changes what comes out."""
COMPILE = """
# Byte code, made while the root is writable; "unchecked": the sources never change beneath it.
USER 0:0
RUN ["python3", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash", "/opt/outrider"]
USER 65534:65534
"""
PACKAGES = """ARG BASE
FROM ${BASE}
USER 0:0
RUN apt-get update -q && INSTALL \\
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
USER 65534:65534
"""
INSTALL = (
    "names='' && for line in LINES; do"
    # The last one stays where the distribution has none of them, so that apt-get says that it lacks it.
    ' for name in $line; do if apt-cache show "$name" >/dev/null 2>&1; then break; fi; done; names="$names $name"; done'
    " && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends $names"
)
HERE = Path(__file__).resolve().parent
_NOT_CONTENT = ("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache")


@dataclass(frozen=True, slots=True)
class StepImage:
    """The image of one step plugin. ``folder`` has ``image/`` and ``program/``."""

    name: str
    tag: str
    folder: Path

    @property
    def dockerfile(self) -> Path:
        return self.folder / "image" / "Dockerfile"

    @property
    def packages(self) -> Path:
        return self.folder / "image" / "packages.txt"

    @property
    def requirements(self) -> Path:
        return self.folder / "image" / "requirements.in"

    @property
    def lock(self) -> Path:
        return self.folder / "image" / "requirements.lock"


@dataclass(frozen=True, slots=True)
class Row:
    """An image and its state: "up to date", "outdated" or "absent". ``id``: the engine's; "" where it is absent."""

    name: str
    tag: str
    state: str
    size_bytes: int
    id: str = ""


class Workshop:
    """Builds ``steps``, and what they stand on. What is fetched and staged for it lies in ``scratch``.

    ``stepkit``: the package outrider_stepkit, which goes into every step image.
    """

    def __init__(self, steps: Sequence[StepImage], *, scratch: Path, stepkit: Path) -> None:
        self.scratch = scratch
        self.stepkit = stepkit
        self.steps = list(steps)
        tags = [step.tag for step in self.steps]
        for tag in tags:
            if tags.count(tag) > 1:
                raise BuildError(f"two plugins make the image {tag}: give one of them another name or version")

    def rows(self) -> list[Row]:
        """All images and their states."""
        present = engine.inspect([BASE, PAUSE, *(step.tag for step in self.steps)])
        wanted = {BASE: self._base_content()}
        if BASE in present:
            wanted[PAUSE] = self._pause_content(present[BASE])
            wanted.update({step.tag: self._step_content(step, present[BASE]) for step in self.steps})
        rows = []
        for name, tag in (("base", BASE), ("pause", PAUSE), *((step.name, step.tag) for step in self.steps)):
            image = present.get(tag)
            if image is None:
                rows.append(Row(name, tag, "absent", 0))
            else:
                same = image.labels.get(engine.CONTENT_LABEL) == wanted.get(tag)
                rows.append(Row(name, tag, "up to date" if same else "outdated", image.size_bytes, image.id))
        return rows

    def build(self, names: Sequence[str], *, base_choice: str, mirror: str, refresh: bool) -> list[Row]:
        """Build the images ``names`` (all, if empty) and the base they stand on, where they are not up to date."""
        known = ["base", "pause", *(step.name for step in self.steps)]
        for name in names:
            if name not in known:
                raise UnknownImage(f"there is no image {name!r}; there are {', '.join(known)}")
        wanted = [*names, "base"] if names else known
        todo = [row.name for row in self.rows() if row.name in wanted and (row.state != "up to date" or refresh)]
        if "base" in todo:
            todo = [name for name in known if name in wanted]  # whatever stands on a new base is new
        if not todo:
            return self.rows()
        engine.check()
        progress = Progress(len(todo))
        with self._alone(progress):
            failures = []
            for name in todo:
                try:
                    with progress.task(name):
                        self._build_one(name, base_choice, mirror, progress)
                except BuildError as error:
                    if name == "base":
                        raise
                    failures.append(str(error))  # one plugin's mistake is no reason to have none of the others
            if failures:
                raise BuildError("\n".join(failures))
        return self.rows()

    def _build_one(self, name: str, base_choice: str, mirror: str, progress: Progress) -> None:
        if name == "base":
            self._build_base(base_choice, mirror, progress)
        elif name == "pause":
            content = self._pause_content(self._present_base())
            engine.build(PAUSE, HERE / "pause_image", arguments={"BASE": BASE}, content=content)
        else:
            self._build_step(next(step for step in self.steps if step.name == name), progress)

    def lock(self, names: Sequence[str], *, upgrade: bool) -> list[Path]:
        """Make the locks of the step images ``names`` (all, if empty); returns the files."""
        known = {step.name: step for step in self.steps if step.requirements.exists()}
        for name in names:
            if name not in known:
                raise UnknownImage(f"there is no image with requirements named {name!r}; there are {', '.join(known)}")
        made = []
        for step in known.values():
            if not names or step.name in names:
                wheels.lock(step.requirements, step.lock, upgrade=upgrade)
                made.append(step.lock)
        return made

    def _present_base(self) -> engine.Image:
        image = engine.inspect([BASE]).get(BASE)
        if image is None:
            raise BuildError(f"the image {BASE} went away while others were built on it: build again")
        return image

    def _base_content(self) -> str:
        return _digest(base.RECIPE, HERE / "base_image")

    def _pause_content(self, under: engine.Image) -> str:
        return _digest(RECIPE, under.id, HERE / "pause_image")

    def _step_content(self, step: StepImage, under: engine.Image) -> str:
        return _digest(RECIPE, COMPILE, under.id, step.folder / "image", step.folder / "program", self.stepkit)

    def _build_base(self, choice: str, mirror: str, progress: Progress) -> None:
        source = base.source(choice, mirror, progress)
        progress.note(f"building on {source}")
        engine.build(BASE, HERE / "base_image", arguments={"SOURCE": source}, content=self._base_content())

    def _build_step(self, step: StepImage, progress: Progress) -> None:
        under = self._present_base()
        content = self._step_content(step, under)
        if step.requirements.exists() and not step.lock.exists():
            raise BuildError(f"{step.lock} is missing: make it with `outrider images lock {step.name}`")
        context = self.scratch / "contexts" / step.name
        shutil.rmtree(context, ignore_errors=True)
        context.mkdir(parents=True)
        lib = context / "lib"
        if step.lock.exists():
            python = engine.python_of(BASE)
            wheelhouse = self.scratch / "wheels" / f"{python['version']}-{python['machine']}"
            wheels.install(step.lock, lib, wheelhouse, python, self.scratch / "tools", progress)
        ignore = shutil.ignore_patterns(*_NOT_CONTENT)
        shutil.copytree(self.stepkit, lib / "outrider_stepkit", ignore=ignore, dirs_exist_ok=True)
        for part in ("program", "image"):
            if (step.folder / part).is_dir():
                shutil.copytree(step.folder / part, context / part, ignore=ignore)
        # Whatever the umask of whoever builds: a step runs as a user that no one here knows.
        for path in context.rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        (context / "Dockerfile").write_text(step.dockerfile.read_text() + COMPILE)
        below = self._with_packages(step, under, progress) if step.packages.exists() else BASE
        engine.build(step.tag, context, arguments={"BASE": below}, content=content, on_line=progress.note)
        shutil.rmtree(context)

    def _with_packages(self, step: StepImage, under: engine.Image, progress: Progress) -> str:
        """The base with the Debian packages that ``step`` asks for; the only build that has a network."""
        lines = package_lines(step.packages)
        names = ", ".join(" or ".join(line) for line in lines)
        context = self.scratch / "contexts" / f"{step.name}.packages"
        shutil.rmtree(context, ignore_errors=True)
        context.mkdir(parents=True)
        (context / "Dockerfile").write_text(PACKAGES.replace("INSTALL", install_command(lines)))
        progress.note(f"installing {names}")
        built = engine.build_layer(context, base=under.id, what=f"installing {names} for {step.tag}")
        shutil.rmtree(context)
        return built

    @contextmanager
    def _alone(self, progress: Progress) -> Iterator[None]:
        """One build at a time in a checkout: `make demo` and `make test` may be run side by side."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        with (self.scratch / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.note("another build is running in this checkout; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def package_lines(file: Path) -> list[list[str]]:
    """The Debian packages that ``file`` names, one a line; ``a | b`` is the first of them that the distribution has."""
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    found = [[name.strip() for name in line.split("|")] for line in lines if line]
    for name in (name for line in found for name in line):
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
            raise BuildError(f"{file}: {name!r} is not the name of a Debian package")
    if not found:
        raise BuildError(f"{file} names no package: one a line, or remove the file")
    return found


def install_command(lines: list[list[str]]) -> str:
    """What a shell runs as root to install a package of each line."""
    return INSTALL.replace("LINES", " ".join(f"'{' '.join(line)}'" for line in lines))


def _digest(*parts: str | Path) -> str:
    """SHA-256 over texts and over files: their names below the given directory, their contents, the executable bit."""
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "big") + data)

    for part in parts:
        if isinstance(part, str):
            add(part.encode())
            continue
        files = sorted(path for path in part.rglob("*") if path.is_file() and not set(path.parts) & set(_NOT_CONTENT))
        add(str(len(files)).encode())
        for path in files:
            add(path.relative_to(part).as_posix().encode())
            add(b"x" if path.stat().st_mode & 0o100 else b"-")
            add(path.read_bytes())
    return digest.hexdigest()
