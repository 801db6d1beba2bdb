"""archive.create."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from outrider_stepkit import Step, StepFailure, staged_directory
from outrider_stepkit.publish import recover

from archiving.choose import Patterns
from archiving.formats import PASSWORD_ENV
from archiving.frames import LEVELS, compressor
from archiving.names import check_name, shown
from archiving.progress import Progress
from archiving.source import Finder, Item, Tally
from archiving.tarwrite import TarWriter
from archiving.volumes import Output

REPRODUCIBLE_TIME = 315532800
"""1980-01-01, the first day that a zip can say."""


def create(step: Step) -> None:
    """Pack into files beside the target; publish by rename when all is complete and on the disk."""
    params = step.params
    source, target = Path(params["from"]), Path(params["to"])
    kind, level = str(params["format"]), params.get("level")
    chosen = LEVELS.get(kind, 0) if level is None else int(level)
    volume_bytes = params.get("volume_size")
    first = target if volume_bytes is None else target.with_name(f"{target.name}.001")
    recover(target)
    _check_target(target, first, params["existing"])
    password = step.secret(PASSWORD_ENV) if params["encrypt"] else None
    _check_password(password, kind)
    fixed = REPRODUCIBLE_TIME if params["reproducible"] else None
    finder = Finder(
        source, target, Patterns(params["include"], params["exclude"]), symlinks=params["symlinks"], mtime=fixed
    )
    expected = finder.count()
    print(f"packing {source} ({expected.entries} entries, {expected.bytes} bytes) into {target} ({kind})")
    for name in expected.names:
        print(f"left out: {shown(name)} is a socket, a device, a pipe, or a link that is not to be packed")
    progress = Progress(step, "packing", expected.bytes)
    with staged_directory(target) as stage:
        output = Output(stage, target, volume_bytes)
        packing = _Packing(finder, output, progress, chosen)
        try:
            if kind == "7z" or password is not None:
                packing.seven(stage, source, kind, password, times=fixed is None)
            elif kind == "zip":
                packing.zip(utc=fixed is not None)
            else:
                packing.tar(kind)
            output.finish()
            output.publish()
        finally:
            output.close()
    tally = packing.tally
    progress.total = tally.bytes
    progress.at(tally.bytes, force=True)
    step.output(
        path=str(first),
        format=kind,
        entries=tally.entries,
        files=tally.files,
        skipped=tally.skipped,
        source_bytes=tally.bytes,
        bytes=output.size,
        sha256=output.sha256,
        volumes=output.volumes,
    )
    print(f"packed {tally.files} files into {output.size} bytes, sha256 {output.sha256}")


class _Packing:
    """One archive on its way into ``output``."""

    def __init__(self, finder: Finder, output: Output, progress: Progress, level: int) -> None:
        self._finder = finder
        self.tally = Tally()
        self._output = output
        self._progress = progress
        self._level = level
        self._done = 0

    def tar(self, kind: str) -> None:
        stream = compressor(kind, self._output, self._level)
        try:
            writer = TarWriter(stream, self._on_bytes)
            writer.add(self._finder.items(self.tally))
            writer.finish()
            stream.finish()
        finally:
            stream.close()

    def zip(self, *, utc: bool) -> None:
        from archiving.zipwrite import ZipWriter

        writer = ZipWriter(self._output, self._level, self._on_bytes, utc=utc)
        try:
            writer.add(_fit(self._finder.items(self.tally)))
            writer.finish()
        finally:
            writer.close()

    def seven(self, stage: Path, source: Path, kind: str, password: str | None, *, times: bool) -> None:
        from archiving import sevenwrite, sevenzip

        wish = sevenwrite.Wish(kind, self._level, password, times)
        made = stage / f"archive.{kind}"
        reason = "the program 7zz, which this image does not have"
        if sevenzip.program() is not None:
            lists = sevenwrite.Lists(stage)
            if lists.fill(self._finder.items(self.tally)):
                where = source.parent if self._finder.is_file else source
                sevenwrite.write_with_7zz(where, lists, made, wish, self._progress.total, self._progress.at)
                self._output.adopt(made)
                return
            self.tally = Tally()
            reason = "names without line breaks, quotes, and spaces at their ends"
        if kind != "7z":
            raise StepFailure(f"an encrypted zip can't be made here: it would need {reason}", code="name_unfit")
        with made.open("w+b") as file:
            sevenwrite.write_with_py7zr(self._finder.items(self.tally), file, wish, self._on_bytes)
        self._output.adopt(made)

    def _on_bytes(self, size: int) -> None:
        self._done += size
        self._progress.at(self._done)


def _fit(items: Iterator[Item]) -> Iterator[Item]:
    for item in items:
        check_name(item.name)
        yield item


def _check_target(target: Path, first: Path, existing: str) -> None:
    if target.is_dir() and not target.is_symlink():
        raise StepFailure(f"{target} is a directory; a file was to be written there", code="is_a_directory")
    if existing == "refuse" and first.exists():
        raise StepFailure(f'{first} exists: choose another name, or existing: "replace"', code="exists")


def _check_password(password: str | None, kind: str) -> None:
    if password is None:
        return
    if not password or "\n" in password or "\r" in password:
        raise StepFailure(f"the password in {PASSWORD_ENV} is empty or has a line break in it", code="password_unfit")
    if kind == "zip" and not password.isascii():
        raise StepFailure(
            f"the password in {PASSWORD_ENV} has a letter that is not ASCII, which zip can't say: choose 7z",
            code="password_unfit",
        )
