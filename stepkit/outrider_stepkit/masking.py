"""Keeping secrets out of what a program prints, so that not even the engine's log has them."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import TextIO

MASK = "***"
MIN_LENGTH = 4
"""Shorter values are not masked: they would black out ordinary text and are no secrets."""
_HELD_BACK = 64 * 1024
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY$|AUTH", re.IGNORECASE)


def secret_values(environ: Mapping[str, str]) -> set[str]:
    """The values of variables whose names say that they are secret. The names of Outrider itself don't count."""
    return {value for name, value in environ.items() if _SECRET_NAME.search(name) and not name.startswith("OUTRIDER_")}


def forms(secret: str) -> set[str]:
    """``secret`` as it may turn up: its lines, each also URL-quoted, escaped for JSON, inside base64."""
    found = set()
    # Line by line: a log has no way to say that two of its lines belong together.
    for part in (part.strip() for part in secret.splitlines()):
        if len(part) < MIN_LENGTH:
            continue
        found |= {part, urllib.parse.quote(part, safe=""), urllib.parse.quote_plus(part), json.dumps(part)[1:-1]}
        for shift in range(3):
            # Within longer data the secret starts at any of three alignments; its edge characters mix with neighbours.
            padded = b"\0" * shift + part.encode()
            start = (0, 2, 3)[shift]
            end = len(padded) * 8 // 6
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                core = encode(padded).decode().rstrip("=")[start:end]
                if len(core) >= MIN_LENGTH + 2:  # of secrets of five bytes and more
                    found.add(core)
    return found


class Masker:
    """Replaces secrets in text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: set[str] = set()
        self._forms: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Mask these, too, from now on."""
        new = set(secrets) - self._secrets
        if new:
            self._secrets |= new
            self._forms = set().union(*(forms(secret) for secret in self._secrets))
            # The longest first: a secret that begins with another must go as a whole.
            longest_first = sorted(self._forms, key=lambda form: (-len(form), form))
            self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def mask(self, text: str) -> str:
        """``text`` without secrets."""
        return self._pattern.sub(MASK, text) if self._pattern else text

    def split(self, text: str) -> tuple[str, str]:
        """Mask as much of a stream's next piece as can be judged; the rest may be the beginning of a secret."""
        if self._pattern is None:
            return text, ""
        cut = len(text) - self._unfinished(text)
        pieces, position = [], 0
        for match in self._pattern.finditer(text):
            if match.start() >= cut:
                break
            pieces += [text[position : match.start()], MASK]
            position = match.end()
            cut = max(cut, position)
        pieces.append(text[position:cut])
        return "".join(pieces), text[cut:]

    def _unfinished(self, text: str) -> int:
        """How many characters at the end of ``text`` may be the beginning of a secret."""
        most = 0
        for form in self._forms:
            start = text.find(form[0], max(0, len(text) - len(form) + 1))
            while start >= 0 and len(text) - start > most:
                if form.startswith(text[start:]):
                    most = len(text) - start
                start = text.find(form[0], start + 1)
        return most


class MaskedStream(io.TextIOBase):
    """A text stream that masks before it writes. A secret split across writes is found as well."""

    def __init__(self, inner: TextIO, masker: Masker, secrets: set[str]) -> None:
        self._inner = inner
        self._masker = masker
        self._secrets = secrets  # grows while the program runs
        self._pending = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a read-only attribute of the base class
        return self._inner.encoding

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._inner.isatty()

    def fileno(self) -> int:
        return self._inner.fileno()

    def write(self, text: str) -> int:
        self._pending += text
        if "\n" in text or len(self._pending) > _HELD_BACK:
            self._drain()
        return len(text)

    def flush(self) -> None:
        self._drain()

    def finish(self) -> None:
        """Write what was held back. The program is over."""
        self._drain(final=True)

    def _drain(self, *, final: bool = False) -> None:
        self._masker.add(self._secrets)
        if final:
            masked, self._pending = self._masker.mask(self._pending), ""
        else:
            masked, self._pending = self._masker.split(self._pending)
        self._inner.write(masked)
        self._inner.flush()
