"""Masking, by property: however a text is cut into writes, no secret gets through."""

from __future__ import annotations

import base64
import io

from hypothesis import given
from hypothesis import strategies as st
from outrider_stepkit.masking import MaskedStream, Masker, forms

SECRETS = st.lists(st.text(alphabet="abAB12+/\n ", min_size=4, max_size=12), min_size=1, max_size=3)


@given(secrets=SECRETS, before=st.text("abx", max_size=8), after=st.text("abx", max_size=8), data=st.data())
def test_no_cut_lets_a_secret_through(secrets: list[str], before: str, after: str, data: st.DataObject) -> None:
    text = before + "".join(secret + after for secret in secrets)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    inner = io.StringIO()
    stream = MaskedStream(inner, Masker(secrets), set())
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        stream.write(text[start:end])
        stream.flush()
    stream.finish()
    assert inner.getvalue() == Masker(secrets).mask(text)
    for secret in secrets:
        for line in (line.strip() for line in secret.splitlines()):
            assert len(line) < 4 or line not in inner.getvalue()


@given(secret=st.text(min_size=6, max_size=40), before=st.binary(max_size=5), after=st.binary(max_size=5))
def test_base64_is_masked_at_every_alignment(secret: str, before: bytes, after: bytes) -> None:
    if len(secret.strip()) < 6 or len(secret.splitlines()) != 1:
        return
    encoded = base64.b64encode(before + secret.strip().encode() + after).decode()
    assert "***" in Masker([secret]).mask(encoded)


def test_text_without_secrets_passes_at_once() -> None:
    inner = io.StringIO()
    stream = MaskedStream(inner, Masker(["secret"]), set())
    stream.write("plain\n")
    assert inner.getvalue() == "plain\n"
    stream.write("se")
    stream.flush()
    assert inner.getvalue() == "plain\n"
    stream.write("ason\n")
    assert inner.getvalue() == "plain\nseason\n"


def test_short_values_and_lines_are_left_alone() -> None:
    assert forms("abc") == set()
    assert Masker(["{\nsecret-key\n}"]).mask("{secret-key}") == "{***}"
