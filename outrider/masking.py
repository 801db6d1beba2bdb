"""Secrets out of a stream of bytes, also when they are cut across chunks or encoded.

Each secret is known in several forms: as it is, each of its lines (a log is read by the line), Base64 in the three
alignments and both alphabets, URL-encoded, JSON-escaped, and hexadecimal. What matches any of them becomes `***`;
matches that overlap become one. How the stream is cut never changes what comes out.
"""

from __future__ import annotations

import base64
import bisect
import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator

MASK = b"***"

MIN_SECRET = 4
"""Bytes. What is shorter ("1", "on", "eu") stands in every log and gives nothing away."""
MIN_LINE = 8
"""Bytes of a line within a secret of several lines, so that a lone `{` of a JSON key file isn't masked everywhere."""
MIN_ENCODED = 6
"""Bytes of the part of a Base64 form that is the same whatever stands around the secret."""

MANY_FORMS = 400
"""From so many on, one pass with the pattern is faster than a search for each form."""

_LONE_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""What no encoding has room for; the others stand for bytes that are no UTF-8."""

_WRAPPED = (57, 48)
"""Bytes behind a line of `base64` (76 characters) and of `openssl base64` (64)."""


class Masker:
    """Masks one stream; make one for each, since it remembers what may be the beginning of a secret.

    ``secrets`` are the values (empty and very short ones are left alone). Feeding is linear in the bytes.
    """

    def __init__(self, secrets: Iterable[str | bytes]) -> None:
        forms = {
            form for secret in secrets for form in _forms(secret if isinstance(secret, bytes) else secret.encode())
        }
        self._forms = sorted(forms)
        self._longest = max(map(len, self._forms), default=0)
        self._find = _compile(self._forms) if self._forms else None
        first = bytes({form[0] for form in self._forms})
        self._first = re.compile(b"[" + re.escape(first) + b"]") if first else None
        self._kept = b""
        self._covered = 0  # so many bytes at the beginning of _kept belong to a match whose *** is out already

    def feed(self, data: bytes) -> bytes:
        """What is certain of the stream so far; a possible beginning of a secret is kept back."""
        if self._find is None:
            return data
        buffer = self._kept + data
        return self._mask(buffer, self._certain(buffer))

    def flush(self) -> bytes:
        """The rest, at the end of the stream; the masker is as new afterwards."""
        rest = self._mask(self._kept, len(self._kept))
        self._kept, self._covered = b"", 0
        return rest

    def _certain(self, buffer: bytes) -> int:
        """The first place from which the buffer's end could yet grow into a form."""
        assert self._first is not None
        for match in self._first.finditer(buffer, max(0, len(buffer) - self._longest + 1)):
            tail = buffer[match.start() :]
            at = bisect.bisect_left(self._forms, tail)
            # Forms that begin with the tail stand right at its place in the sorted list; the tail itself, if it is
            # a whole form, comes before those that are longer.
            if at < len(self._forms) and self._forms[at] == tail:
                at += 1
            if at < len(self._forms) and self._forms[at].startswith(tail):
                return match.start()
        return len(buffer)

    def _mask(self, buffer: bytes, certain: int) -> bytes:
        """Put out the first ``certain`` bytes, masked, and keep the others."""
        out: list[bytes] = []
        end = self._covered
        for match in self._matches(buffer):
            start = match.start()
            if start >= certain:
                break
            if start >= end:
                out += (buffer[end:start], MASK)
            end = max(end, match.end(1))
        if end < certain:
            out.append(buffer[end:certain])
            end = certain
        self._kept, self._covered = buffer[certain:], end - certain
        return b"".join(out)

    def _matches(self, buffer: bytes) -> Iterable[re.Match[bytes]]:
        # Nearly all of a log holds no secret, and so many plain searches take a tenth of the pattern's time.
        if self._find is None or (len(self._forms) <= MANY_FORMS and not any(form in buffer for form in self._forms)):
            return ()
        return self._find.finditer(buffer)


def mask_text(text: str, secrets: Iterable[str | bytes]) -> str:
    """One whole text masked, for messages and other short things."""
    masker = Masker(secrets)
    text = _LONE_SURROGATES.sub("\ufffd", text)
    return (masker.feed(text.encode("utf-8", "surrogateescape")) + masker.flush()).decode("utf-8", "surrogateescape")


def contains_secret(data: bytes, secrets: Iterable[str | bytes]) -> bool:
    """Whether any form of any secret stands in ``data``."""
    masker = Masker(secrets)
    return masker._find is not None and masker._find.search(data) is not None


def _forms(secret: bytes) -> Iterator[bytes]:
    """Every byte string that gives the secret away."""
    whole = secret.strip(b"\r\n")
    if len(whole) < MIN_SECRET:
        return
    yield from _encodings(whole)
    lines = [line.strip() for line in whole.splitlines()]
    if len(lines) > 1:
        for line in lines:
            if len(line) >= MIN_LINE:
                yield from _encodings(line)
    if secret != whole:
        yield from _base64_forms(secret)


def _encodings(secret: bytes) -> Iterator[bytes]:
    yield secret
    yield from _base64_forms(secret)
    for safe in ("", "/"):
        quoted = urllib.parse.quote(secret, safe=safe)
        yield quoted.encode()
        yield re.sub(r"%[0-9A-F]{2}", lambda found: found[0].lower(), quoted).encode()
    yield urllib.parse.quote_plus(secret).encode()
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    try:
        text = secret.decode()
    except UnicodeDecodeError:
        return
    escaped = json.dumps(text)[1:-1]
    yield escaped.encode()
    yield escaped.replace("/", "\\/").encode()
    yield json.dumps(text, ensure_ascii=False)[1:-1].encode()
    yield json.dumps(escaped)[1:-1].encode()  # JSON within JSON, as log drivers make it


def _base64_forms(secret: bytes) -> Iterator[bytes]:
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + secret)
        # The characters at either end that also hold bits of what stands around the secret are not its own.
        start = (0, 2, 3)[offset]
        core = encoded[start : (offset + len(secret)) * 8 // 6]
        yield from _both_alphabets(core)
    for width in _WRAPPED:
        if len(secret) > width:
            for at in range(0, len(secret), width):
                piece = secret[at : at + width]
                encoded = base64.b64encode(piece)
                yield from _both_alphabets(encoded[: len(piece) * 8 // 6])
                yield from _both_alphabets(encoded.rstrip(b"="))  # the end of the last line


def _both_alphabets(core: bytes) -> Iterator[bytes]:
    if len(core) >= MIN_ENCODED:
        yield core
        yield core.translate(bytes.maketrans(b"+/", b"-_"))


def _compile(forms: list[bytes]) -> re.Pattern[bytes]:
    """A pattern that at each place captures the longest form there without moving on, so that overlaps are seen."""
    return re.compile(b"(?=(" + _trie(forms, 0) + b"))", re.DOTALL)


def _trie(forms: list[bytes], depth: int) -> bytes:
    """The sorted ``forms``, equal up to ``depth``, as nested alternatives, longest first."""
    out = b""
    while True:
        whole = len(forms[0]) == depth
        rest = forms[1:] if whole else forms
        if whole:
            if not rest:
                return out
            return out + b"(?:" + _branches(rest, depth) + b")?"
        if len(rest) == 1:
            return out + re.escape(rest[0][depth:])
        shared = depth
        first, last = rest[0], rest[-1]
        while shared < min(len(first), len(last)) and first[shared] == last[shared]:
            shared += 1
        if shared == depth:
            return out + b"(?:" + _branches(rest, depth) + b")"
        out += re.escape(first[depth:shared])
        forms, depth = rest, shared


def _branches(forms: list[bytes], depth: int) -> bytes:
    groups: list[list[bytes]] = []
    for form in forms:
        if groups and groups[-1][0][depth] == form[depth]:
            groups[-1].append(form)
        else:
            groups.append([form])
    return b"|".join(_trie(group, depth) for group in groups)
