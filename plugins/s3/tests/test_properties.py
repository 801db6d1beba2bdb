"""Names, ranges and checksums, for all inputs that hypothesis thinks of."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outrider_stepkit import Selection, StepFailure

sys.path.insert(0, str(Path(__file__).parents[1] / "program"))

from s3_transfer.api import Listed, Version
from s3_transfer.checks import BEST, Verifier, digest_of, encoded
from s3_transfer.objects import list_objects
from s3_transfer.partial import Partials, partials
from s3_transfer.settings import Settings
from s3_transfer.terms import PART_BYTES, Terms, part_bytes

PIECES = st.sampled_from(["a", "b", "..", ".", "", "a.b", "..a", "\0", "ü", "x" * 256, ".outrider-stage.z"])
NAMES = st.lists(PIECES, min_size=1, max_size=4).map("/".join)
_WISHES: list[tuple[dict[str, str], dict[str, str], str | None]] = [({}, {}, None), ({}, {}, "crc64nvme")]
IDENTITIES = st.sampled_from(["0a", "1b", "2c"])


class Listing:
    """A store that has these keys and nothing else."""

    settings = Settings.read({"bucket": "builds", "endpoint": "http://store"}, {})

    def __init__(self, keys: set[str]) -> None:
        self.keys = keys

    def listing(self, prefix: str) -> Any:
        return (Listed(key, 1, '"t"') for key in sorted(self.keys) if key.startswith(prefix))


@given(names=st.sets(NAMES, min_size=1, max_size=4))
@settings(deadline=None)
def test_no_name_leads_out_of_the_target(names: set[str]) -> None:
    api: Any = Listing({f"p/{name}" for name in names})
    try:
        entries = list_objects(api, "p", Selection())
    except StepFailure:
        return
    places = [os.path.normpath(os.path.join("/target", entry.name)) for entry in entries]
    for entry, place in zip(entries, places, strict=True):
        assert place == f"/target/{entry.name}"
        assert not any(other.startswith(f"{place}/") for other in places), "a file where a directory has to be"
    assert len(set(places)) == len(entries)


@given(
    notes=st.lists(st.tuples(IDENTITIES, st.integers(0, 3), st.integers(1, 9)), max_size=12),
    whole=st.sets(IDENTITIES),
    cut=st.integers(0, 20),
)
@settings(deadline=None, max_examples=60)
def test_log_cut_anywhere_knows_of_no_byte_that_was_not_noted(
    notes: list[tuple[str, int, int]], whole: set[str], cut: int
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        kept = Partials(folder)
        for identity, offset, length in notes:
            kept.note(identity, offset, length)
        for identity in whole:
            kept.finish(identity, "ab" * 32)
        text = (folder / "log").read_bytes()
        (folder / "log").write_bytes(text[: max(len(text) - cut, 0)])
        again = Partials(folder)
        for identity, ranges in again.ranges.items():
            for offset, length in ranges.items():
                assert (identity, offset, length) in notes
        assert set(again.whole) <= whole
        assert not set(again.whole) & {identity for identity, ranges in again.ranges.items() if ranges}
        if cut == 0:
            assert set(again.whole) == whole


def test_log_is_not_believed_after_a_reboot(tmp_path: Path) -> None:
    Partials(tmp_path).note("0a", 0, 5)
    (tmp_path / "0a").write_bytes(b"12345")
    log = tmp_path / "log"
    log.write_text(log.read_text().replace(log.read_text().split()[1], "another-boot"))
    assert Partials(tmp_path).ranges == {}
    assert not (tmp_path / "0a").exists()


def test_two_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    with partials(tmp_path / "k", directory=False) as first, partials(tmp_path / "k", directory=False) as second:
        assert first.folder != second.folder
    assert os.listdir(tmp_path) == []


@given(data=st.binary(max_size=200), part=st.integers(1, 60), cuts=st.lists(st.integers(0, 200)), flip=st.booleans())
@settings(deadline=None)
@pytest.mark.parametrize("algorithm", [*BEST, "md5"])
def test_checksums_of_parts_are_the_same_however_the_bytes_arrive(
    algorithm: str, data: bytes, part: int, cuts: list[int], flip: bool
) -> None:
    parts = [data[at : at + part] for at in range(0, len(data), part)]
    if algorithm == "md5" or not parts:
        stored = {} if algorithm == "md5" else {algorithm: encoded(_digest(algorithm, data))}
        tag = f'"{hashlib.md5(data).hexdigest()}"'
    else:
        whole = _digest(algorithm, b"".join(_digest(algorithm, each) for each in parts))
        stored, tag = {algorithm: f"{encoded(whole)}-{len(parts)}"}, '"x-2"'
    verifier = Verifier(Version(len(data), tag, None, stored), expected=None, service=True, part_size=lambda: part)
    assert verifier.checked == algorithm
    arrived = bytes([data[0] ^ 1]) + data[1:] if flip and data else data
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in pairwise(ends):
        verifier.update(arrived[start:end])
    if arrived == data:
        assert verifier.finish("it") == hashlib.sha256(data).hexdigest()
    else:
        with pytest.raises(StepFailure, match="damaged"):
            verifier.finish("it")


def _digest(algorithm: str, data: bytes) -> bytes:
    made = digest_of(algorithm)
    made.update(data)
    return made.digest()


def test_crcs_are_what_their_specifications_say() -> None:
    assert base64.b64decode(encoded(_digest("crc32", b"123456789"))) == zlib.crc32(b"123456789").to_bytes(4, "big")
    assert _digest("crc32c", b"123456789").hex() == "e3069283"
    assert _digest("crc64nvme", b"123456789").hex() == "ae8b14860a799888"


@given(size=st.integers(0, 5 * 1024**4), key=st.text(max_size=4))
def test_parts_of_any_file_are_within_the_limits_of_s3(size: int, key: str) -> None:
    part = part_bytes(size, Terms({}, {}, None).mark(key))
    if part is None:
        assert size <= PART_BYTES
        return
    count = -(-size // part)
    assert 2 <= count <= 10_000
    assert 5 * 1024**2 <= part <= 5 * 1024**3


@pytest.mark.parametrize(
    ("asked", "said", "fits"),
    [
        (("aws:kms", None), ("aws:kms", "arn:aws:kms:eu-1:123:key/k1"), True),
        (("aws:kms", "k1"), ("aws:kms", "arn:aws:kms:eu-1:123:key/k1"), True),
        (("aws:kms", "arn:aws:kms:eu-1:123:key/k1"), ("aws:kms", "k1"), True),
        (("aws:kms", "alias/mine"), ("aws:kms", "arn:aws:kms:eu-1:123:key/k1"), True),
        (("aws:kms", "k2"), ("aws:kms", "arn:aws:kms:eu-1:123:key/k1"), False),
        (("aws:kms", "alias/mine"), ("AES256", None), False),
        (("aws:kms", None), (None, None), False),
        (("AES256", None), ("aws:kms", "k1"), False),
        ((None, None), ("aws:kms", "k1"), True),
    ],
)
def test_encryption_is_compared_as_stores_say_it(
    asked: tuple[str | None, str | None], said: tuple[str | None, str | None], fits: bool
) -> None:
    names = "x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id"
    sent, answer = ({name: value for name, value in zip(names, pair, strict=True) if value} for pair in (asked, said))
    assert Terms(sent, {}, None).encrypted(Version.of(answer)) == fits


def test_parts_tell_steps_and_wishes_apart() -> None:
    tagged, classed = {"a": "b"}, {"x-amz-storage-class": "STANDARD_IA"}
    terms = [Terms(*wishes, writer=writer) for writer in ("r1 a", "r2 a", "r1 b") for wishes in _WISHES]
    terms += [Terms({}, tagged, None), Terms(classed, {}, None), Terms({}, {}, None, customer_key=b"k" * 32)]
    marks = {each.mark(key) for each in terms for key in ("a", "b")}
    assert len(marks) == 2 * len(terms)
    assert Terms({}, {}, None, writer="r1 a").mark("a") == Terms({}, {}, None, writer="r1 a").mark("a")
