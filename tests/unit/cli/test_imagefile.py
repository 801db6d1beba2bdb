"""The file of `outrider images save`: it says what is in it, and is refused when anything in it is not as it was."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.cli import _imagefile as imagefile
from outrider.cli._imagefile import SavedImage
from outrider.errors import InvalidInput, OutriderError, PermanentError

CONFIGS = {"game/a:1": b'{"config": "a"}', "game/b:2": b'{"config": "b"}'}


def image(name: str) -> SavedImage:
    return SavedImage(name, f"sha256:{hashlib.sha256(CONFIGS[name]).hexdigest()}", 100, "linux/amd64")


IMAGES = [image(name) for name in CONFIGS]


def archive(*names: str, extra: bytes = b"layer " * 1000) -> bytes:
    """What an engine's save writes, as far as it matters here."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:

        def add(name: str, data: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        add("layer/layer.tar", extra)
        manifest = []
        for name in names:
            config = f"{hashlib.sha256(CONFIGS[name]).hexdigest()}.json"
            add(config, CONFIGS[name])
            manifest.append({"Config": config, "RepoTags": [name], "Layers": ["layer/layer.tar"]})
        add("manifest.json", json.dumps(manifest).encode())
    return packed.getvalue()


def cut(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 700):
        yield data[start : start + 700]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "fleet.images"
    imagefile.write(path, IMAGES, cut(archive(*CONFIGS)), made_by="outrider 0", created="2026-01-01T00:00:00Z")
    return path


def load(data: bytes) -> tuple[tuple[SavedImage, ...], bytes]:
    """What is handed to an engine, and which images it is said to be."""
    file = io.BytesIO(data)
    contents = imagefile.verify(file, "f.images")
    return contents.images, b"".join(imagefile.payload(file, contents))


def test_what_was_saved_is_what_is_loaded(saved: Path) -> None:
    assert load(saved.read_bytes()) == (tuple(IMAGES), archive(*CONFIGS))
    assert imagefile.sha256_of(saved) == hashlib.sha256(saved.read_bytes()).hexdigest()


def test_the_file_can_be_used_without_this_program(saved: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", str(saved), "-C", str(tmp_path)], check=True)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path, check=True)
    listed = json.loads((tmp_path / "images.json").read_text())
    assert [each["name"] for each in listed["images"]] == list(CONFIGS)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_changes_what_is_loaded(saved: Path, data: st.DataObject) -> None:
    spoilt = bytearray(saved.read_bytes())
    spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        loaded = load(bytes(spoilt))
    except InvalidInput:
        return
    assert loaded == (tuple(IMAGES), archive(*CONFIGS))  # it was in a byte that nobody reads


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_was_cut_off_is_refused(saved: Path, data: st.DataObject) -> None:
    whole = saved.read_bytes()
    end = len(whole.rstrip(b"\0")) - 1  # after that, only padding is lost
    with pytest.raises(InvalidInput, match=r"f.images can't be loaded"):
        load(whole[: data.draw(st.integers(0, end))])


@pytest.mark.parametrize("content", [b"", b"x" * 5000, archive("game/a:1")], ids=["empty", "noise", "docker save"])
def test_another_file_is_said_to_be_one(content: bytes) -> None:
    with pytest.raises(InvalidInput, match="is not a file of `outrider images save`"):
        load(content)


def test_an_engine_that_saved_other_images_leaves_no_file(tmp_path: Path) -> None:
    for made, listed in (
        (archive(*CONFIGS), IMAGES[:1]),  # one more than is listed
        (archive("game/a:1"), IMAGES),  # one less
        (archive("game/b:2"), [SavedImage("game/b:2", image("game/a:1").id, 1, "")]),  # another content
        (b"no archive", IMAGES),
    ):
        with pytest.raises(PermanentError, match="saved other images than were asked for"):
            imagefile.write(tmp_path / "f", listed, cut(made), made_by="", created="")
        assert list(tmp_path.iterdir()) == []


def test_a_failure_while_saving_leaves_the_former_file(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"former")

    def failing() -> Iterator[bytes]:
        yield b"x"
        raise PermanentError("the engine is gone")

    with pytest.raises(PermanentError, match="the engine is gone"):
        imagefile.write(target, IMAGES, failing(), made_by="", created="")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("f", b"former")]
    with pytest.raises(OutriderError, match="can't be written: No such file or directory"):
        imagefile.write(tmp_path / "none" / "f", IMAGES, failing(), made_by="", created="")


def test_the_engine_never_gets_the_end_of_a_file_that_changed_after_it_was_verified(saved: Path) -> None:
    data = saved.read_bytes()
    file = io.BytesIO(data)
    contents = imagefile.verify(file, "f")
    # The same file, but for a payload that is valid, and another one.
    other = zstandard.ZstdCompressor().compress(archive(*CONFIGS, extra=b"evil! " * 1000))
    file.seek(contents.offset)
    file.write(other.ljust(contents.packed_bytes, b"\0")[: contents.packed_bytes])
    handed: list[bytes] = []
    with pytest.raises(InvalidInput, match="was changed while it was being loaded"):
        handed.extend(imagefile.payload(file, contents))
    assert b"manifest.json" not in b"".join(handed)


def test_a_digest_that_was_told_by_another_way_is_compared(saved: Path) -> None:
    imagefile.refuse_digest(saved, imagefile.sha256_of(saved).upper())
    with pytest.raises(InvalidInput, match=r"has the SHA-256 [0-9a-f]{64}, not 1234"):
        imagefile.refuse_digest(saved, "1234")


def test_what_unpacks_to_more_than_it_says_is_not_unpacked(saved: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", str(saved), "-C", str(tmp_path)], check=True)
    index = tmp_path / "images.json"
    index.write_text(index.read_text().replace('"unpacked_bytes": ', '"unpacked_bytes": 1, "was": '))
    sums = "".join(
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("images.tar.zst", "images.json")
    )
    (tmp_path / "SHA256SUMS").write_text(sums)
    names = ["images.tar.zst", "images.json", "SHA256SUMS"]
    made = subprocess.run(["tar", "-cf", "-", *names], cwd=tmp_path, check=True, capture_output=True).stdout
    with pytest.raises(InvalidInput, match="unpacks to more than it says"):
        load(made)
