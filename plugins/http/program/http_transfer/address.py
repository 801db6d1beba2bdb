"""Addresses: how they go over the wire, which origin they are of, and how they may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from outrider_stepkit import StepFailure

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")
# Left as they are: what RFC 3986 reserves, and what is quoted already.
_PATH_SAFE, _QUERY_SAFE = "/%:@!$&'()*+,;=-._~", "/%:@!$&'()*+,;=-._~?"


@dataclass(frozen=True, slots=True)
class Url:
    """An ``http://`` or ``https://`` address, taken apart."""

    scheme: str
    host: str
    """As it is connected to: a name in ASCII, in lower case, or an IP address without brackets."""
    port: int
    target: str
    """Path and query, quoted."""

    @classmethod
    def parse(cls, text: str) -> Url:
        """Raises ValueError, which does not repeat ``text``: it may hold a password or a signature."""
        parts = urlsplit(text)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
        if scheme not in _PORTS or not host or port == 0 or parts.username is not None or parts.password is not None:
            raise ValueError("not an address like https://host/path without user and password")
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        # Judged as it is used: what was no space may have become one on the way to ASCII.
        if not _HOST.fullmatch(host):
            raise ValueError("the host has characters that no host has")
        target = quote(parts.path or "/", safe=_PATH_SAFE)
        if parts.query:
            target += "?" + quote(parts.query, safe=_QUERY_SAFE)
        return cls(scheme, host.lower(), port or _PORTS[scheme], target)

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def secure(self) -> bool:
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """Host and, where it is not the scheme's own, port: what the Host header carries."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def shown(self) -> str:
        """As it may be shown: without the query, which may be a signature."""
        return f"{self.scheme}://{self.authority}{self.target.partition('?')[0]}"

    def whole(self) -> str:
        """With everything; not to be shown."""
        return f"{self.scheme}://{self.authority}{self.target}"

    def led_to(self, location: str) -> Url:
        """Where a redirect leads. Raises StepFailure for what can't or must not be followed."""
        try:
            # Header values come as Latin-1; servers that put a name in as it is mean UTF-8.
            location = location.encode("latin-1").decode("utf-8", "replace")
            target = Url.parse(urljoin(self.whole(), location.strip()).partition("#")[0])
        except ValueError:
            raise StepFailure(f"{self.shown} redirects to an address that can't be followed", code="redirect") from None
        if self.secure and not target.secure:
            raise StepFailure(
                f"{self.shown} redirects from HTTPS to {target.shown}, where nobody would notice a forged answer",
                code="redirect",
            )
        return target
