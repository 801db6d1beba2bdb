"""The kit asks of a script what it asks of every step's program."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import tarfile
import threading
from collections.abc import Iterator

import pytest

from outrider.testing import Attempted, Example, Failing, StepConformance, Wrong

PARAMS = {"of": "/saves", "to": "/out/saves.tar.gz"}
VOLUMES = {"saves": "/saves", "out": "/out:rw"}


@pytest.fixture(scope="module")
def step_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A game that goes on writing to the file "saves/written" of whichever example has one."""
    over, folder = threading.Event(), tmp_path_factory.getbasetemp()

    def write() -> None:
        while not over.wait(0.02):
            with contextlib.suppress(FileNotFoundError):
                for file in folder.glob("*/saves/written"):
                    os.utime(file)

    game = threading.Thread(target=write)
    game.start()
    yield
    over.set()
    game.join()


def holds_the_files(done: Attempted) -> None:
    data = gzip.decompress((done.volumes["out"] / "saves.tar.gz").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert sorted(archive.getnames()) == [".", "./a", './a/"quoted" name', "./world"]
        world = archive.extractfile("./world")
        assert world is not None
        assert world.read() == b"22"


class TestTake(StepConformance):
    step_type = "snapshot.take"
    plugin = "outrider_step_snapshot"
    examples = (
        Example(
            "two files",
            PARAMS,
            volumes=VOLUMES,
            files={'saves/a/"quoted" name': b"1", "saves/world": b"22"},
            check=holds_the_files,
        ),
    )
    failing = (
        Failing("no directory", {**PARAMS, "of": '/saves/"x"'}, volumes=VOLUMES, code="not_a_directory", says='"x"'),
        Failing("nowhere", {**PARAMS, "to": "/out/x/y.tar.gz"}, volumes=VOLUMES, code="not_writable", says="/out/x/y"),
        Failing(
            "written to meanwhile",
            PARAMS,
            volumes=VOLUMES,
            files={"saves/written": 128 * 1024**2},
            code="changed",
            says="./written",
            temporary=True,
        ),
    )
    wrong = (
        Wrong("level", {**PARAMS, "level": 10}, volumes=VOLUMES, says="with.level"),
        Wrong("read-only target", {**PARAMS, "to": "/saves/x.tar.gz"}, volumes=VOLUMES, says="read-only"),
    )
    long = Example("large file", PARAMS, volumes=VOLUMES, files={"saves/world": 128 * 1024**2})
    throttle = 0.05
