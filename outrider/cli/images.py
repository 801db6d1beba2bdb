"""`outrider images`: the images of step plugins, built here, and carried to nodes that reach no registry."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import click

from outrider.cli._output import emit_json, note, output_option, size, table

if TYPE_CHECKING:
    from outrider.cli._imagefile import Contents, SavedImage
    from outrider.cli.imagebuild import Row, Workshop

F = TypeVar("F", bound=Callable[..., Any])

_plugins = click.option(
    "--plugin",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="The source folder of a plugin that is not installed, too.",
)
_names = click.argument("names", nargs=-1, metavar="[NAME]...")


@click.group("images", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Build the images of step plugins, and carry images to nodes as one file."""


@command.command()
@_names
@_plugins
@click.option("--refresh", is_flag=True, help="Build again what is up to date: newer packages of the distribution.")
@click.option(
    "--base",
    type=click.Choice(["auto", "registry", "debootstrap"]),
    default="auto",
    show_default=True,
    help="Where the base comes from: python:3.12-slim of a registry, or Debian made here.",
)
@click.option("--debian-mirror", default="", metavar="URL", help="A mirror for debootstrap other than its own.")
@output_option
def build(
    names: tuple[str, ...], folders: tuple[Path, ...], refresh: bool, base: str, debian_mirror: str, as_json: bool
) -> None:
    """Build what is not up to date of the images of the plugins installed here; NAME: base, pause, or a plugin's.

    Needs a container engine. A plugin's distribution carries what its image is made of, so no checkout is needed.
    """
    with _sentences():
        workshop, without = _workshop(folders)
        rows = workshop.build(names, base_choice=base, mirror=debian_mirror, refresh=refresh)
    _show(rows, without, as_json)


@command.command("list")
@_plugins
@click.option(
    "--file", type=click.Path(path_type=Path), help="What is in this file, made by `save`, instead; it is verified."
)
@output_option
def list_(folders: tuple[Path, ...], file: Path | None, as_json: bool) -> None:
    """List the images of the plugins installed here, whether they are up to date, and their ids."""
    if file is not None:
        with _opened(file) as stream:
            _show_contents(_verified(stream, file), as_json)
        return
    with _sentences():
        workshop, without = _workshop(folders)
        rows = workshop.rows()
    _show(rows, without, as_json)


@command.command()
@_names
@_plugins
@click.option("--upgrade", is_flag=True, help="Move to the newest versions.")
@output_option
def lock(names: tuple[str, ...], folders: tuple[Path, ...], upgrade: bool, as_json: bool) -> None:
    """Make image/requirements.lock of image/requirements.in, with the hashes of all files. Needs uv."""
    with _sentences():
        workshop, _ = _workshop(folders)
        made = workshop.lock(names, upgrade=upgrade)
    if as_json:
        emit_json([str(path) for path in made])
    else:
        for path in made:
            click.echo(str(path))


@command.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_names
@_plugins
@output_option
def save(file: Path, names: tuple[str, ...], folders: tuple[Path, ...], as_json: bool) -> None:
    """Write images to FILE, with checksums, for `outrider images load` on nodes that reach no registry.

    NAME is base, pause, the name of a plugin, or any image that the engine has (game/arena:3). Without one, these are
    pause and the images of all plugins installed here: what a node needs to run them.
    """
    from outrider import __version__
    from outrider.cli._imagefile import sha256_of, write
    from outrider.cli.imagebuild import engine

    with _sentences():
        chosen = _chosen(_workshop(folders)[0], names)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        meter = _Meter("saved")
        chunks = meter.through(engine.save([image.name for image in chosen]))
        contents = write(file, chosen, chunks, made_by=f"outrider {__version__}", created=created)
        meter.over()
    digest = sha256_of(file)
    if as_json:
        emit_json({**_described(contents), "file": str(file), "file_sha256": digest, "bytes": file.stat().st_size})
        return
    _show_contents(contents, False)
    note(f"{file}: {size(file.stat().st_size)}, SHA-256 {digest}")


@command.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--sha256", metavar="HEX", help="Refuse a file with another SHA-256 than this, which `save` has printed.")
@output_option
def load(file: Path, sha256: str | None, as_json: bool) -> None:
    """Hand the images in FILE (- is stdin) to the engine of this machine, once all of it has been verified.

    What the engine has already is not loaded again.
    """
    from outrider.cli._imagefile import payload, refuse_digest
    from outrider.cli.imagebuild import engine
    from outrider.errors import PermanentError

    with _opened(file) as stream, _sentences():
        if sha256 is not None:
            refuse_digest(Path(stream.name), sha256)
        contents = _verified(stream, file)
        engine.check()
        names = [image.name for image in contents.images]
        had = {name: image.id for name, image in engine.inspect(names).items()}
        platform = engine.platform()
        for image in contents.images:
            if image.platform != platform:
                note(f"warning: {image.name} is made for {image.platform}, and this machine is {platform}")
        if any(had.get(image.name) != image.id for image in contents.images):
            meter = _Meter("loaded")
            engine.load(meter.through(payload(stream, contents), of=contents.unpacked_bytes))
            meter.over()
        has = {name: image.id for name, image in engine.inspect(names).items()}
        wrong = [image.name for image in contents.images if has.get(image.name) != image.id]
        if wrong:
            raise PermanentError(
                f"the engine says that it has other images now than were loaded: {', '.join(wrong)}",
                hint="somebody else may be loading or pulling them: try again",
            )
    _show_contents(contents, as_json, had)


def _workshop(folders: Sequence[Path]) -> tuple[Workshop, list[str]]:
    from outrider.cli.imagebuild import of_machine

    return of_machine(folders)


def _chosen(workshop: Workshop, names: Sequence[str]) -> list[SavedImage]:
    """The images that ``names`` mean, as the engine has them."""
    from outrider.cli._imagefile import SavedImage
    from outrider.cli.imagebuild import PAUSE, BuildError, engine
    from outrider.errors import InvalidInput

    rows = {row.name: row for row in workshop.rows()}
    tags = []
    for name in names or [row.name for row in rows.values() if row.name != "base"]:
        row = rows.get(name)
        if row is None and not any(mark in name for mark in "/:"):
            raise InvalidInput(
                f"there is no image {name}", hint=f"there are {', '.join(rows)}; other images by name and tag"
            )
        if "@" in name:
            raise InvalidInput(f"{name} has no name of its own in a file", hint="give it a tag, and save that")
        if row is not None and row.state == "outdated":
            note(f"warning: {row.tag} is not up to date (outrider images build)")
        tags.append(row.tag if row is not None else name if ":" in name.rpartition("/")[2] else f"{name}:latest")
    tags = list(dict.fromkeys(tags))
    present = engine.inspect(tags)
    missing = [tag for tag in tags if tag not in present]
    ours = {row.tag for row in rows.values()} | {PAUSE}
    if missing:
        engine.check()
        fix = "outrider images build" if ours.issuperset(missing) else "build or pull them first"
        raise BuildError(f"the engine has no {', '.join(missing)}: {fix}")
    return [SavedImage(tag, present[tag].id, present[tag].size_bytes, present[tag].platform) for tag in tags]


def _opened(file: Path) -> IO[bytes]:
    """The file, which can be read more than once; stdin is copied to a file that goes when it is closed."""
    import shutil
    import tempfile

    from outrider.errors import InvalidInput, PermanentError

    if str(file) != "-":
        try:
            return file.open("rb")
        except FileNotFoundError as error:
            raise InvalidInput(f"there is no file {file}", code="file_missing") from error
        except OSError as error:
            raise InvalidInput(f"{file} can't be read: {error.strerror}", code="file_unreadable") from error
    try:
        copy = tempfile.NamedTemporaryFile(dir="/var/tmp", prefix="outrider-images-")  # noqa: SIM115
        shutil.copyfileobj(sys.stdin.buffer, copy, 2**20)
        copy.flush()
    except OSError as error:
        raise PermanentError(f"stdin can't be copied to /var/tmp: {error.strerror}", code="not_writable") from error
    return cast("IO[bytes]", copy)


def _verified(stream: IO[bytes], file: Path) -> Contents:
    from outrider.cli._imagefile import verify

    meter = _Meter("verified")
    contents = verify(stream, "what stdin gave" if str(file) == "-" else str(file), meter.at)
    meter.over()
    return contents


@contextmanager
def _sentences() -> Iterator[None]:
    """What goes wrong in the workshop as an error of ours."""
    from outrider.cli.imagebuild import BuildError, UnknownImage
    from outrider.errors import NotFound, PermanentError

    try:
        yield
    except UnknownImage as error:
        raise NotFound(str(error), code="unknown_image") from error
    except BuildError as error:
        raise PermanentError(str(error), code="image_build") from error


def _show(rows: Sequence[Row], without: Sequence[str], as_json: bool) -> None:
    if as_json:
        emit_json([asdict(row) for row in rows])
    else:
        lines = [(row.tag, row.name, row.state, size(row.size_bytes) if row.id else "", row.id) for row in rows]
        table(("IMAGE", "NAME", "STATE", "SIZE", "ID"), lines, empty="there are no images")
    for name in without:
        note(f"{name} carries no image: what its steps run in comes from elsewhere")


def _described(contents: Contents) -> dict[str, Any]:
    return {
        "images": [asdict(image) for image in contents.images],
        "made_by": contents.made_by,
        "created": contents.created,
        "sha256": contents.sha256,
    }


def _show_contents(contents: Contents, as_json: bool, had: dict[str, str] | None = None) -> None:
    if as_json:
        told = _described(contents)
        if had is not None:
            told["loaded"] = [image.name for image in contents.images if had.get(image.name) != image.id]
        emit_json(told)
        return
    rows: list[tuple[str, ...]] = []
    for image in contents.images:
        state = () if had is None else ("was there" if had.get(image.name) == image.id else "loaded",)
        rows.append((image.name, *state, size(image.size_bytes), image.platform, image.id))
    headers = ("IMAGE", *(() if had is None else ("STATE",)), "SIZE", "PLATFORM", "ID")
    table(headers, rows, empty="there are no images in it")


class _Meter:
    """How far something is, on stderr: a line that changes on a terminal, else one every ten seconds."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._terminal = sys.stderr.isatty()
        self._started = self._said = time.monotonic()
        self._drawn = False

    def through(self, chunks: Iterator[bytes], of: int = 0) -> Iterator[bytes]:
        done = 0
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            self.at(done, of)

    def at(self, done: int, of: int = 0) -> None:
        now = time.monotonic()
        if now - self._said < (0.1 if self._terminal else 10):
            return
        self._said = now
        share = f" of {size(of)}" if of else ""
        text = f"{self._verb} {size(done)}{share}, {size(round(done / (now - self._started)))}/s"
        click.echo(f"\r\x1b[K{text}" if self._terminal else text, err=True, nl=not self._terminal)
        self._drawn = self._terminal

    def over(self) -> None:
        if self._drawn:
            click.echo("\r\x1b[K", err=True, nl=False)
