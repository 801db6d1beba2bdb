"""Secrets don't get through, however the stream is cut or they are encoded; other bytes do."""

from __future__ import annotations

import base64
import json
import random
import time
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.masking import MASK, Masker, contains_secret, mask_text

SECRET = "hunter2/s3cr+t=Ä"
PEM = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\n{\nEFAASCBKcwggSjAgEAAoIBAQ\n-----END KEY-----\n"


def mask(data: bytes, *secrets: str, cuts: list[int] | None = None) -> bytes:
    masker = Masker(secrets)
    out, at = b"", 0
    for cut in sorted(cuts or []):
        out += masker.feed(data[at:cut])
        at = max(at, cut)
    return out + masker.feed(data[at:]) + masker.flush()


def test_a_secret_is_masked_and_nothing_else() -> None:
    assert mask(f"login with {SECRET} now".encode(), SECRET) == b"login with *** now"
    assert mask(b"nothing of it", SECRET) == b"nothing of it"


@pytest.mark.parametrize("before", ["", "x", "user:", "ab"])
@pytest.mark.parametrize("after", ["", "y", "@host"])
def test_base64_is_masked_in_every_alignment_and_alphabet(before: str, after: str) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        encoded = encode(f"{before}{SECRET}{after}".encode())
        masked = mask(b"Basic " + encoded + b"\n", SECRET)
        assert MASK in masked
        # At most the characters that it shares with its neighbours are left.
        assert len(masked) - len(b"Basic \n") - len(MASK) <= len(encode(before.encode() + after.encode())) + 6


def test_wrapped_base64_as_the_command_makes_it_is_masked() -> None:
    secret = "".join(random.Random(1).choices("abcdefghijklmnop0123456789", k=200))
    wrapped = base64.encodebytes(secret.encode())
    assert wrapped.count(b"\n") > 2
    assert mask(wrapped, secret).replace(b"\n", b"").strip(b"=") == MASK * wrapped.count(b"\n")


@pytest.mark.parametrize(
    "encoded",
    [
        urllib.parse.quote(SECRET, safe=""),
        urllib.parse.quote(SECRET),
        urllib.parse.quote_plus(SECRET),
        "hunter2%2fs3cr%2bt%3d%c3%84",
        json.dumps(SECRET)[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1],
        json.dumps(json.dumps(SECRET)[1:-1])[1:-1],
        json.dumps(SECRET)[1:-1].replace("/", "\\/"),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
    ],
)  # fmt: skip
def test_encoded_forms_are_masked(encoded: str) -> None:
    assert mask(f"<{encoded}>".encode(), SECRET) == b"<***>"


def test_a_secret_of_several_lines_is_masked_by_line_but_a_brace_is_not() -> None:
    for line in ("MIIEvQIBADANBgkqhkiG9w0BAQ", "-----BEGIN KEY-----"):
        assert mask(f"log: {line} end".encode(), PEM) == b"log: *** end"
    assert mask(PEM.replace("\n", "\r\n").encode(), PEM).count(b"MII") == 0
    assert mask(b"{ }", PEM) == b"{ }"
    assert mask(json.dumps({"key": PEM}).encode(), PEM) == b'{"key": "***\\n"}'


def test_short_values_are_not_masked_everywhere() -> None:
    assert mask(b"eu 1 on", "eu", "1", "on", "") == b"eu 1 on"


def test_overlapping_secrets_become_one_mask_and_leave_no_rest() -> None:
    assert mask(b"<abcdefgh>", "abcdef", "cdefgh") == b"<***>"
    assert mask(b"<abcdefgh>", "abcdefgh", "cdef") == b"<***>"
    assert mask(b"<abcdef>", "abcd", "abcdef") == b"<***>"


def test_what_may_be_a_secret_waits_and_everything_else_is_out_at_once() -> None:
    masker = Masker(["secret-value"])
    assert masker.feed(b"a line\n") == b"a line\n"
    assert masker.feed(b"it is secret-") == b"it is "
    assert masker.feed(b"agent") == b"secret-agent"
    assert masker.feed(b" secret-val") == b" "
    assert masker.feed(b"ue.") == b"***."
    assert masker.feed(b"secret") == b""
    assert masker.flush() == b"secret"
    assert masker.feed(b"-value") + masker.flush() == b"-value"


PIECES = [
    *(SECRET.encode(), b"hunter2", b"abcd", b"abcdefgh", b"cdefgh", b"efghij", b"\n", b"{", b"x", b"aaaaaaa"),
    *(PEM.encode(), b"MIIEvQIBADANBgkqhkiG9w0BAQ", base64.b64encode(f"x{SECRET}".encode())),
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=12).map(b"".join), st.data())
def test_cuts_never_change_what_comes_out(data: bytes, cuts: st.DataObject) -> None:
    secrets = (SECRET, PEM, "abcd", "cdefgh", "abcdefgh", "aaaa", "efghij")
    at = cuts.draw(st.lists(st.integers(0, len(data)), max_size=12))
    masked = mask(data, *secrets, cuts=at)
    assert masked == mask(data, *secrets)
    for secret in secrets:
        assert secret.encode() not in masked


@given(st.text(min_size=4, max_size=30), st.binary(max_size=40), st.binary(max_size=40))
def test_any_secret_is_masked_wherever_it_stands(secret: str, before: bytes, after: bytes) -> None:
    encoded = secret.encode().strip(b"\r\n")
    masked = mask(before + encoded + after, secret)
    if len(encoded) >= 4 and encoded not in before + MASK + after:
        assert encoded not in masked
    if contains_secret(before + after, [secret]) is False and len(encoded) < 4:
        assert masked == before + encoded + after


def test_masking_keeps_up_with_a_busy_log() -> None:
    secrets = [f"{number:040x}" for number in range(1, 20)] + [PEM]
    line = b"2024-01-01T00:00:00Z INFO player joined from 203.0.113.7, 0000000 of 16 slots taken\n" * 12_000
    masker = Masker(secrets)
    start = time.process_time()
    assert b"".join(masker.feed(line[at : at + 65536]) for at in range(0, len(line), 65536)) + masker.flush() == line
    assert time.process_time() - start < 1  # a megabyte


def test_a_stream_of_nothing_but_beginnings_takes_linear_time() -> None:
    masker = Masker(["a" * 5000 + "b"])
    data = b"a" * 200_000
    start = time.process_time()
    assert b"".join(masker.feed(data[at : at + 4096]) for at in range(0, len(data), 4096)) + masker.flush() == data
    assert time.process_time() - start < 5


def test_messages_and_outputs() -> None:
    assert mask_text(f"the key {SECRET} is wrong", [SECRET]) == "the key *** is wrong"
    assert contains_secret(base64.b64encode(SECRET.encode()), [SECRET])
    assert not contains_secret(b"harmless", [SECRET])
    assert not contains_secret(b"harmless", [])
