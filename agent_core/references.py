"""Image references: what a name, a tag and a digest are, and what two spellings of the same mean.

The grammar and the rules are those of the distribution project's `reference` package, which every engine uses: the
part before the first slash is a registry if it has a dot or a colon or is ``localhost``; a name without a registry is
Docker Hub's, and one without a slash lies in its ``library``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from outrider.errors import InvalidInput

HUB = "docker.io"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_LENGTH = 512
_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9-]+)*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
)
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# An engine takes the beginning of an image's id for the image, whatever the image's name is.
_LIKE_AN_ID = re.compile(r"(?:sha256:)?[0-9a-f]{1,64}")


@dataclass(frozen=True, slots=True)
class ImageReference:
    """``registry`` is "" where the reference names none; ``tag`` and ``digest`` are "" where it has none."""

    registry: str
    path: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """The parts of ``text``. InvalidInput if it is not the name of an image, or could be an image's id, too."""
        rest, at, digest = text.partition("@")
        head, colon, tag = rest.rpartition(":")
        if not colon or "/" in tag:  # without a tag; the colon, if there is one, is of the registry's port
            head, tag, colon = rest, "", ""
        first, slash, path = head.partition("/")
        registry = first if slash and ("." in first or ":" in first or first == "localhost") else ""
        path = path if registry else head
        wrong = (
            len(text) > MAX_LENGTH
            or not _PATH.fullmatch(path)
            or (registry and not _HOST.fullmatch(registry))
            or (colon and not _TAG.fullmatch(tag))
            or (at and not DIGEST.fullmatch(digest))
        )
        if not wrong and _LIKE_AN_ID.fullmatch(text):
            raise InvalidInput(
                f"{text!r} may be an image's id as well as its name",
                code="bad_image_name",
                hint=f"write it with its tag, {head}:latest" if head == text else "write the image's name",
            )
        if wrong:
            raise InvalidInput(
                f"{text!r} is not the name of an image",
                code="bad_image_name",
                hint="it reads like name:tag or host/name:tag, in lower-case letters, or name@sha256:…",
            )
        return cls(registry, path, tag, digest)

    @property
    def name(self) -> str:
        """Registry and path, as written."""
        return f"{self.registry}/{self.path}" if self.registry else self.path

    @property
    def host(self) -> str:
        """The registry that it means."""
        return HUB if self.registry in ("", "index.docker.io") else self.registry

    @property
    def full_path(self) -> str:
        """The path as a registry knows it: Docker Hub's official images lie in ``library``."""
        return f"library/{self.path}" if self.host == HUB and "/" not in self.path else self.path

    @property
    def repository(self) -> str:
        """Registry and path in one spelling for all: what is equal here is the same repository."""
        return f"{self.host}/{self.full_path}"

    @property
    def effective_tag(self) -> str:
        """The tag that it means; "" where the digest says which image it is."""
        return self.tag or ("" if self.digest else "latest")

    @property
    def normal(self) -> str:
        """Repository and tag (or digest) in one spelling: what is equal here is the same image."""
        return f"{self.repository}@{self.digest}" if self.digest else f"{self.repository}:{self.effective_tag}"

    def at(self, digest: str) -> ImageReference:
        """The same repository's image with this digest."""
        return replace(self, tag="", digest=digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}{f'@{self.digest}' if self.digest else ''}"
