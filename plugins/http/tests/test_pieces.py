"""The parts of the program that can be proved for all inputs: pieces, ranges, addresses, names, forms."""

from __future__ import annotations

import email.parser
import email.policy
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from http_transfer.address import Url
from http_transfer.download import _target
from http_transfer.failures import of_status, retry_after
from http_transfer.partial import partial_file
from http_transfer.pieces import ENDLESS, Claim, Pieces
from http_transfer.ranges import continues, part_of, range_header, strong_validator
from http_transfer.upload import form_around
from hypothesis import example, given
from hypothesis import strategies as st
from outrider_stepkit import StepFailure

MIB = 1024**2
sizes = st.integers(min_value=0, max_value=600 * MIB)


def headers(**fields: str) -> Message:
    made = Message()
    for name, value in fields.items():
        made[name.replace("_", "-")] = value
    return made


@given(total=sizes, moves=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 80 * MIB), st.booleans()), max_size=40))
def test_every_byte_is_fetched_once_however_workers_come_and_go(total: int, moves: list[tuple[int, int, bool]]) -> None:
    pieces = Pieces(total)
    held: dict[int, Claim] = {}
    fetched: list[tuple[int, int]] = []

    def fetch(claim: Claim, count: int) -> None:
        fetched.append((claim.at, claim.at + count))
        pieces.arrived(claim, count)

    for worker, count, leaves in moves:
        claim = held.pop(worker, None) or pieces.claim(4)
        if claim is None:
            continue
        fetch(claim, min(count, claim.end - claim.at))
        if claim.at < claim.end:
            if leaves:
                pieces.give_back(claim)
            else:
                held[worker] = claim
        assert pieces.done() == sum(end - start for start, end in fetched)
        assert pieces.frontier <= min((start for start, _ in pieces.missing()), default=total)
    for claim in held.values():
        pieces.give_back(claim)
    while claim := pieces.claim():
        fetch(claim, claim.end - claim.at)
    fetched.sort()
    assert [start for start, _ in fetched] == [0, *(end for _, end in fetched[:-1])][: len(fetched)]
    assert sum(end - start for start, end in fetched) == total == pieces.frontier == pieces.done()


@given(total=st.integers(1, 600 * MIB), cuts=st.lists(st.integers(0, 600 * MIB), max_size=8))
def test_what_is_taken_up_is_what_was_left(total: int, cuts: list[int]) -> None:
    edges = sorted({min(cut, total) for cut in cuts})
    missing = list(zip(edges[::2], edges[1::2], strict=False))
    pieces = Pieces(total, missing)
    assert pieces.missing() == [each for each in missing if each[0] < each[1]]
    assert Pieces(total, pieces.missing()).done() == total - sum(end - start for start, end in missing)
    assert pieces.frontier == (missing[0][0] if missing else total)


def test_content_without_a_length_ends_where_it_ends() -> None:
    pieces = Pieces(ENDLESS)
    claim = pieces.claim(at=0)
    assert claim is not None
    pieces.arrived(claim, 12345)
    pieces.end_at(claim.at)
    assert (pieces.total, pieces.missing(), pieces.frontier, pieces.done()) == (12345, [], 12345, 12345)


@given(start=st.integers(0, 10**15), length=st.integers(1, 10**15), more=st.integers(0, 10**15))
def test_range_that_was_asked_for_is_known_by_its_answer(start: int, length: int, more: int) -> None:
    end, total = start + length, start + length + more
    assert range_header(start, end) == f"bytes={start}-{end - 1}"
    answer = headers(Content_Range=f"bytes {start}-{end - 1}/{total}", ETag='"a"')
    part = part_of(answer)
    assert part is not None
    assert (part.start, part.end, part.total) == (start, end, total)
    assert continues(answer, start, total, '"a"')
    assert continues(headers(Content_Range=f"bytes {start}-{end - 1}/*"), start, total, '"a"')
    assert not continues(answer, start + 1, total, '"a"')
    assert not continues(answer, start, total + 1, '"a"')
    assert not continues(answer, start, total, '"b"')


@given(st.text(max_size=40) | st.from_regex(r"\Abytes \d+-\d+/(\d+|\*)\Z"))
@example("bytes 5-4/10")
@example("bytes 0-10/10")
@example("bytes ٣-٤/١٠")
@example("bytes */10")
def test_nonsense_is_no_range(value: str) -> None:
    try:
        part = part_of(headers(Content_Range=value.replace("\r", "").replace("\n", "")))
    except ValueError:
        return  # email's own refusal to carry it; such a header never comes out of a connection
    assert part is None or 0 <= part.start < part.end <= (part.total or part.end)


def test_only_what_can_not_be_the_same_by_chance_validates() -> None:
    dated = {"Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    assert strong_validator(headers(ETag='"a"', **dated)) == '"a"'
    assert strong_validator(headers(ETag='W/"a"', **dated)) is None
    assert strong_validator(headers(**dated, Date="Mon, 01 Jan 2024 00:00:09 GMT")) == dated["Last_Modified"]
    assert strong_validator(headers(**dated, Date=dated["Last_Modified"])) is None
    assert strong_validator(headers(ETag='"a"', Accept_Ranges="none")) is None
    assert strong_validator(headers()) is None


@given(st.text(max_size=300))
@example("..%2f..%2fetc%2fpasswd")
@example("%2e%2e")
@example("a%00b")
@example("ä" * 200)
def test_name_of_an_address_never_leads_out_of_the_directory(path: str) -> None:
    url = "https://host/" + path.replace("#", "").replace("?", "")
    try:
        target = _target("/no/such/directory/", url, "https://host/…")
    except (StepFailure, ValueError):
        return
    assert str(Path(target).parent) == "/no/such/directory"
    assert "\0" not in target
    assert len(target.rpartition("/")[2].encode("utf-8", "surrogateescape")) <= 255


@given(st.text(max_size=80))
@example("user:secret-word@host/x")
@example("[::1]:99999/")
@example("host:0/")
def test_address_is_taken_apart_or_refused_without_being_repeated(rest: str) -> None:
    url, said = None, ""
    try:
        url = Url.parse(f"https://{rest}")
    except ValueError as error:
        said = str(error)
    if url is None:
        assert said
        assert "secret-word" not in said
        return
    assert url.host.isascii()
    assert 0 < url.port < 65536
    assert url.target.isascii()
    assert not any(character in url.target for character in " \r\n\t#")
    assert Url.parse(url.whole()) == url
    assert "?" not in url.shown


@pytest.mark.parametrize(
    ("location", "leads_to"),
    [
        ("/x", "https://h.example:8443/x"),
        ("y?a=b", "https://h.example:8443/d/y?a=b"),
        ("//other.example/z", "https://other.example/z"),
        ("https://other.example", "https://other.example/"),
        ("HTTPS://Other.Example:443/A b", "https://other.example/A%20b"),
        ("/gr\u00c3\u00b6\u00c3\u009fe", "https://h.example:8443/gr%C3%B6%C3%9Fe"),
        ("/x#part", "https://h.example:8443/x"),
    ],
)
def test_redirects_lead_where_they_say(location: str, leads_to: str) -> None:
    assert Url.parse("https://h.example:8443/d/x").led_to(location).whole() == leads_to


@pytest.mark.parametrize(
    "location",
    ["http://h.example/x", "ftp://h/x", "https://u:p@h/x", "https://h:0/", "https://[::1", "https://h:1x/"],
)
def test_redirects_that_are_not_followed(location: str) -> None:
    with pytest.raises(StepFailure) as refused:
        Url.parse("https://h.example/x").led_to(location)
    assert refused.value.code == "redirect"


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@given(fields=st.dictionaries(words, words, max_size=4), field=words, name=words, content=st.binary(max_size=200))
def test_form_is_read_as_it_was_meant(fields: dict[str, str], field: str, name: str, content: bytes) -> None:
    form: dict[str, Any] = {"file": field, "fields": fields}
    head, tail = form_around("outrider-0123", form, name)
    raw = b'Content-Type: multipart/form-data; boundary="outrider-0123"\r\n\r\n' + head + content + tail
    parts = raw.split(b"\r\n--outrider-0123")
    assert len(parts) == len(fields) + 3
    assert parts[-1] == b"--\r\n"
    assert parts[-2].endswith(b"\r\n\r\n" + content)
    disposition = parts[-2].decode("utf-8", "replace").split("\r\n")[1]
    quoted = [each.replace('"', "%22") for each in (field, name)]
    assert disposition == f'Content-Disposition: form-data; name="{quoted[0]}"; filename="{quoted[1]}"'
    parsed = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(raw)
    assert len(list(parsed.iter_parts())) == len(fields) + 1


def test_waits_as_the_server_wishes_within_reason() -> None:
    date = "Mon, 01 Jan 2024 00:00:00 GMT"
    assert retry_after(headers(Retry_After="7")) == 7
    assert retry_after(headers(Retry_After="99999999999999999999")) == 30
    assert retry_after(headers(Retry_After="Mon, 01 Jan 2024 00:00:09 GMT", Date=date)) == 9
    assert retry_after(headers(Retry_After="Sun, 31 Dec 2023 00:00:09 GMT", Date=date)) == 0
    for nonsense in ("", "soon", "-5", "٣"):
        assert retry_after(headers(Retry_After=nonsense, Date=date)) == 0


def test_every_status_has_a_class_and_a_sentence() -> None:
    for status in range(400, 600):
        failure = of_status(status, headers(), "https://h/x")
        assert failure is not None
        assert str(status) in str(failure)
        again = status in {408, 425, 429} or (status >= 500 and status not in {501, 505, 507, 511})
        assert failure.temporary == again
    assert of_status(206, headers(), "") is None


def test_partial_file_is_believed_only_if_it_can_be_true(tmp_path: Path) -> None:
    target = tmp_path / "k"

    class Killed(BaseException):
        pass

    def leave(total: int, missing: list[tuple[int, int]], size: int) -> None:
        with partial_file(target) as partial:
            partial.forget()
            partial.note("x", '"v"', None, total, missing)
            (tmp_path / ".outrider-stage.k.resume").write_bytes(bytes(size))
            raise StepFailure("later", temporary=True)

    def known() -> bool:
        with partial_file(target) as partial:
            return partial.known("x") is not None and partial.known("y") is None

    for total, missing, size, believed in (
        (10, [(4, 10)], 4, True),
        (10, [], 10, True),
        (10, [(2, 4)], 10, True),
        (10, [(2, 4)], 9, False),  # bytes after the gap are not there
        (10, [(4, 10)], 3, False),
        (10, [(4, 11)], 4, False),
        (10, [(5, 4)], 10, False),
    ):
        with pytest.raises(StepFailure):
            leave(total, missing, size)
        assert known() == believed, (total, missing, size)
        assert list(tmp_path.iterdir()) == [], "nobody goes on with it: it goes"
    with pytest.raises(StepFailure):
        leave(10, [(4, 10)], 4)
    note = tmp_path / ".outrider-stage.k.resume-note"
    note.write_text(note.read_text().replace('"boot": "', '"boot": "another'))
    assert not known(), "after a reboot nobody knows what reached the disk"
