"""The archive step types keep the contract, by the kit that every step author has."""

from __future__ import annotations

import io
import os
import tarfile

import py7zr

from outrider.testing import Attempted, Example, Failing, StepConformance, Wrong

MIB = 1024**2
VOLUMES = {"data": "/data:rw"}
SECRET = "s3cr3t-Archive+0123456789"


def tar(*members: tuple[str, bytes], mode: str = "w:gz") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as archive:  # type: ignore[call-overload]  # the mode is the test's
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def encrypted(*members: tuple[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with py7zr.SevenZipFile(raw, "w", password=SECRET) as archive:
        for name, content in members:
            archive.writestr(content, name)
    return raw.getvalue()


def unpacked(attempted: Attempted) -> None:
    assert (attempted.volumes["data"] / "out" / "maps" / "dm1").read_bytes() == b"map"


class TestExtract(StepConformance):
    step_type = "archive.extract"
    examples = (
        Example(
            "a tar.gz",
            {"from": "/data/a.tar.gz", "to": "/data/out"},
            volumes=VOLUMES,
            files={"data/a.tar.gz": tar(("maps/dm1", b"map"), ("readme", b"text"))},
            outputs={"files": 2, "format": "tar.gz", "bytes": 7},
            check=unpacked,
        ),
        Example(
            "an encrypted 7z",
            {"from": "/data/a.7z", "to": "/data/out"},
            volumes=VOLUMES,
            files={"data/a.7z": encrypted(("maps/dm1", b"map"))},
            secrets={"ARCHIVE_PASSWORD": SECRET},
            outputs={"files": 1, "format": "7z"},
            check=unpacked,
        ),
    )
    failing = (
        Failing(
            "a name that leads out",
            {"from": "/data/a.tar", "to": "/data/out"},
            volumes=VOLUMES,
            files={"data/a.tar": tar(("../evil", b"x"), mode="w")},
            code="archive_unsafe",
            says="'../evil'",
        ),
    )
    wrong = (Wrong("relative path", {"from": "a.tar", "to": "/data/out"}, says="from"),)
    long = Example(
        "a large one",
        {"from": "/data/large.tar", "to": "/data/out", "format": "tar"},
        volumes=VOLUMES,
        files={"data/large.tar": tar(("noise", os.urandom(256 * MIB)), mode="w")},
    )
    throttle = 0.05


class TestCreate(StepConformance):
    step_type = "archive.create"
    examples = (
        Example(
            "a directory as a zip",
            {"from": "/data/in", "to": "/data/out.zip"},
            volumes=VOLUMES,
            files={"data/in/a": b"one", "data/in/b/c": b"two"},
            outputs={"files": 2, "format": "zip", "volumes": 1},
        ),
    )
    failing = (
        Failing(
            "nothing to pack",
            {"from": "/data/none", "to": "/data/out.zip"},
            volumes=VOLUMES,
            code="not_found",
            says="/data/none does not exist",
        ),
    )
    wrong = (Wrong("relative path", {"from": "in", "to": "/data/out.zip"}, says="from"),)
    long = Example(
        "much to pack",
        {"from": "/data/large", "to": "/data/out.tar.xz", "level": 6},
        volumes=VOLUMES,
        files={"data/large": os.urandom(16 * MIB) * 4},
    )
