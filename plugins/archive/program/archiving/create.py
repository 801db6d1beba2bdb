"""archive.create."""

from __future__ import annotations

from pathlib import Path

from outrider_stepkit import Step, sha256_of, staged_file

from archiving import source as sources
from archiving import writers


def create(step: Step) -> None:
    """Pack into a file beside the target; publish by rename when it is complete and on the disk."""
    source, target = Path(step.params["from"]), Path(step.params["to"])
    kind = str(step.params["format"])
    if step.params["existing"] == "refuse" and target.exists():
        step.fail(f'{target} exists: choose another name, or existing: "replace"', code="exists")
    found = sources.find(source, target)
    total, done = found.bytes, 0
    print(f"packing {source} ({len(found.items)} entries, {total} bytes) into {target} ({kind})")
    for name in found.skipped[:20]:
        print(f"left out: {name!a} is a socket, a device, a pipe, or a link that leads out of {source}")

    def on_bytes(size: int) -> None:
        nonlocal done
        done += size
        step.progress(done, total, message="packing")

    with staged_file(target) as file:
        writers.write(kind, found, file, step.params.get("level"), on_bytes)
        file.flush()
        size = file.seek(0, 2)
        digest = sha256_of(file.name)
    step.progress(total, total, message="packed", force=True)
    step.output(
        path=str(target),
        format=kind,
        entries=len(found.items),
        files=found.files,
        skipped=len(found.skipped),
        source_bytes=total,
        bytes=size,
        sha256=digest,
    )
    print(f"packed {found.files} files into {size} bytes, sha256 {digest}")
