"""Both step types against the kit that every step plugin is tested with."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile

from outrider.testing import Attempted, Example, Failing, StepConformance, Wrong

VOLUMES = {"in": "/in", "out": "/out:rw"}
PASSWORD = "Tr0ub4dor-3-xkcd"
NOISE = random.Random(7).randbytes(24 * 1024**2)


def zipped(**files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def packed(**files: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


def has_both(done: Attempted) -> None:
    folder = done.volumes["out"] / "maps"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"22"}


def is_encrypted(done: Attempted) -> None:
    with zipfile.ZipFile(done.volumes["out"] / "saves.zip") as archive:
        assert [each.filename for each in archive.infolist() if each.flag_bits & 1] == ["world"]


class TestExtract(StepConformance):
    step_type = "archive.extract"
    plugin = "outrider_step_archive"
    examples = (
        Example(
            "zip",
            {"from": "/in/a.zip", "to": "/out/maps"},
            volumes=VOLUMES,
            files={"in/a.zip": zipped(a=b"1", b=b"22")},
            outputs={"files": 2, "bytes": 3, "format": "zip", "path": "/out/maps"},
            check=has_both,
        ),
        Example(
            "tar.gz told by its content",
            {"from": "/in/a", "to": "/out/maps"},
            volumes=VOLUMES,
            files={"in/a": packed(a=b"1", b=b"22")},
            outputs={"files": 2, "format": "tar.gz"},
            secrets={"ARCHIVE_PASSWORD": PASSWORD},
            check=has_both,
        ),
    )
    failing = (
        Failing(
            "no archive",
            {"from": "/in/a.zip", "to": "/out/maps"},
            volumes=VOLUMES,
            files={"in/a.zip": b"this is none"},
            says="/in/a.zip",
        ),
        Failing("no file", {"from": "/in/x.zip", "to": "/out/maps"}, volumes=VOLUMES, says="/in/x.zip"),
    )
    wrong = (
        Wrong("relative target", {"from": "/in/a.zip", "to": "maps"}, volumes=VOLUMES, says="with.to"),
        Wrong("read-only target", {"from": "/in/a.zip", "to": "/in/maps"}, volumes=VOLUMES, says="read-only"),
        Wrong("unknown format", {"from": "/in/a", "to": "/out/a", "format": "rar"}, volumes=VOLUMES, says="format"),
    )
    long = Example(
        "large", {"from": "/in/a.tar.gz", "to": "/out/maps"}, volumes=VOLUMES, files={"in/a.tar.gz": packed(a=NOISE)}
    )
    throttle = 0.05


class TestCreate(StepConformance):
    step_type = "archive.create"
    plugin = "outrider_step_archive"
    examples = (
        Example(
            "reproducible tar.zst",
            {"from": "/in", "to": "/out/saves.tar.zst", "reproducible": True},
            volumes=VOLUMES,
            files={"in/world": b"22", "in/a/b": b"1"},
            outputs={"files": 2, "source_bytes": 3, "format": "tar.zst", "volumes": 1},
        ),
        Example(
            "encrypted zip",
            {"from": "/in", "to": "/out/saves.zip", "encrypt": True},
            volumes=VOLUMES,
            files={"in/world": b"22" * 1000},
            secrets={"ARCHIVE_PASSWORD": PASSWORD},
            outputs={"files": 1},
            varying=("sha256", "out/saves.zip"),  # encryption begins with random bytes
            check=is_encrypted,
        ),
    )
    failing = (Failing("no such directory", {"from": "/in/x", "to": "/out/a.zip"}, volumes=VOLUMES, says="/in/x"),)
    wrong = (
        Wrong("format not told", {"from": "/in", "to": "/out/saves"}, volumes=VOLUMES, says="format"),
        Wrong("level of another format", {"from": "/in", "to": "/out/a.zip", "level": 12}, volumes=VOLUMES, says="12"),
        Wrong("encrypted without a password", {"from": "/in", "to": "/out/a.zip", "encrypt": True}, volumes=VOLUMES),
    )
    long = Example(
        "large", {"from": "/in", "to": "/out/a.tar.xz"}, volumes=VOLUMES, files={"in/a": NOISE[: 3 * 1024**2]}
    )
    throttle = 0.05
