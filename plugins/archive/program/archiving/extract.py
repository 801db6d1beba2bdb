"""archive.extract."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, cast

from outrider_stepkit import Step, staged_directory

from archiving import placing
from archiving.formats import format_of, open_archive
from archiving.readers import read_tar, read_zip
from archiving.streams import Counting
from archiving.tree import Tree


def extract(step: Step) -> None:
    """Unpack beside the target, on the same volume; publish by rename when all of it is there."""
    source, target = str(step.params["from"]), Path(step.params["to"])
    existing = step.params["existing"]
    strip = int(step.params["strip_components"])
    placing.check_target(target, existing)
    with open_archive(source) as plain:
        size = os.fstat(plain.fileno()).st_size
        kind = step.params.get("format") or format_of(source, plain)
        print(f"unpacking {source} ({kind}, {size} bytes) to {target}")
        with staged_directory(target) as stage:
            tree, aside = stage / "tree", stage / "aside"
            tree.mkdir()
            aside.mkdir()
            with Tree(
                tree,
                max_bytes=int(step.params["max_bytes"]),
                max_entries=int(step.params["max_entries"]),
                on_bytes=lambda done, total: step.progress(done, total, message="unpacking"),
            ) as into:
                if kind == "7z":
                    from archiving.sevenzip import read_7z  # py7zr takes a third of a second to import

                    read_7z(source, plain, into, strip)
                elif kind == "zip":
                    read_zip(source, plain, into, strip)
                else:
                    # A tar does not say how much is in it: how far its file is read tells the progress.
                    counting = Counting(plain, lambda position: step.progress(position, size, message="unpacking"))
                    read_tar(source, cast("BinaryIO", counting), kind, into, strip)
                into.finish()
            placing.publish(tree, target, existing, aside)
    step.progress(into.bytes, into.bytes, message="unpacked", force=True)
    step.output(path=str(target), format=kind, entries=into.entries, files=into.files, bytes=into.bytes)
    print(f"unpacked {into.files} files, {into.bytes} bytes")
