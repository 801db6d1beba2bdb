"""archive.extract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outrider_stepkit import Step, StepFailure, staged_directory
from outrider_stepkit.publish import recover

from archiving import placing
from archiving.choose import Choice
from archiving.formats import PASSWORD_ENV, decoding, format_of, reading
from archiving.progress import Progress
from archiving.streams import Decoder, Incoming
from archiving.tarread import read_tar
from archiving.tree import Limits, Tree
from archiving.volumes import Source
from archiving.zipread import is_folder, members_of, needs_other_tool, place, read_zip


def extract(step: Step) -> None:
    """Unpack beside the target, on the same volume; publish by rename when all of it is there."""
    params = step.params
    path, target = str(params["from"]), Path(params["to"])
    existing = params["existing"]
    recover(target)
    placing.check_target(target, existing)
    with Source(path) as source:
        kind = params.get("format") or format_of(path, source)
        volumes = f" in {len(source.paths)} volumes" if len(source.paths) > 1 else ""
        print(f"unpacking {path} ({kind}, {source.size} bytes{volumes}) to {target}")
        with staged_directory(target) as stage:
            tree = stage / "tree"
            tree.mkdir()
            into = _unpacked(step, source, kind, tree)
            placing.publish(tree, target, existing)
    step.progress(into.bytes, into.bytes, message="unpacked", force=True)
    step.output(
        path=str(target), format=kind, entries=into.entries, files=into.files, bytes=into.bytes, skipped=into.skipped
    )
    print(f"unpacked {into.files} files, {into.bytes} bytes")


def _unpacked(step: Step, source: Source, kind: str, tree: Path) -> Tree:
    params = step.params
    limits = Limits(
        max_bytes=int(params["max_bytes"]),
        max_entries=int(params["max_entries"]),
        max_ratio=float(params["max_ratio"]),
        archive_bytes=source.size,
    )
    choice = Choice(
        strip=int(params["strip_components"]),
        include=params["include"],
        exclude=params["exclude"],
        max_depth=int(params["max_depth"]),
    )
    more: dict[str, Any] = {"symlinks": params["symlinks"], "plain_modes": params["permissions"] == "plain"}
    password = step.secret(PASSWORD_ENV, "") or None
    progress = Progress(step, "unpacking", source.size)
    if kind in ("7z", "zip"):
        # These say beforehand how much is in them.
        with Tree(tree, limits, on_bytes=progress.at, **more) as into:
            if kind == "7z":
                from archiving.sevenread import read_7z

                read_7z(source, into, choice, password)
            else:
                _zip(source, into, choice, password, progress)
            into.finish()
        return into
    with Tree(tree, limits, **more) as into:
        # A tar does not say how much is in it: how far its file is read tells the progress.
        if kind == "tar":
            stream = Incoming.of_file(source)
            with reading(source.path):
                read_tar(stream, into, choice, lambda: progress.at(stream.read_bytes))
        else:
            _compressed_tar(source, kind, into, choice, progress)
        into.finish()
    return into


def _compressed_tar(source: Source, kind: str, into: Tree, choice: Choice, progress: Progress) -> None:
    decoder = Decoder(source, kind)
    try:
        stream = Incoming(decoder.fetch)
        with reading(source.path):
            read_tar(stream, into, choice, lambda: progress.at(decoder.position))
    finally:
        decoder.close()


def _zip(source: Source, into: Tree, choice: Choice, password: str | None, progress: Progress) -> None:
    with decoding(source.path):
        archive, members = members_of(source)
        total = sum(member.file_size for member in members)
        into.expect(total, len(members))
        progress.total = total
        reason = needs_other_tool(members)
        if reason is None:
            read_zip(source, archive, members, into, choice)
            return
    from archiving import sevenzip

    if reason == "encrypted" and password is None:
        raise sevenzip.encrypted(source.path)
    if sevenzip.program() is None:
        raise StepFailure(
            f"{source.path} is a zip that needs 7zip ({reason}), which this image does not have: build the image"
            " with it",
            code="archive_unsupported",
        )
    contents = sevenzip.Contents(source.path, password)
    try:
        with decoding(source.path):
            for member in members:
                parts = choice.parts(member.filename, backslash=True)
                # AE-2 encryption leaves the checksum out; its own was verified by 7zz.
                checksum = member.CRC or None
                empty = is_folder(member) or not member.file_size
                pieces = iter(()) if empty else contents.entry(member.filename, member.file_size, checksum)
                if parts is None:
                    for _ in pieces:
                        pass
                else:
                    place(member, parts, into, pieces)
            contents.finish()
    except StepFailure as error:
        raise contents.explained(error) from error
    finally:
        contents.close()
