"""What a node's policy says of images: which may run, where they come from, and which content a name stands for."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from agent_core.references import DIGEST, ImageReference
from outrider.errors import InvalidInput, PolicyViolation


class ImagePolicy(BaseModel):
    """The section ``images`` of the policy file.

    ``allow``: patterns for the reference as plans and pipelines write it (``game/*``, ``*`` for all).
    ``pull``: "missing" pulls what the node has not; "never" pulls nothing; "always" asks the registry once for each
    run and each start of a managed container whether there is a newer one.
    ``prefix``: stands before every name that has no registry of its own, where it is pulled.
    ``mirrors``: by registry, where its images are pulled from instead: a host, or a host and a path.
    ``registries``: hosts that images may be pulled from, after both; empty: any.
    ``digests``: the one content that a reference stands for here, by ``sha256:…``: what its registry calls the
    image's digest, or what an engine calls its id (for images that were loaded from a file).
    ``require_digest``: nothing runs whose content neither ``digests`` nor its reference says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: tuple[str, ...] = ("*",)
    registries: tuple[str, ...] = ()
    pull: Literal["always", "missing", "never"] = "missing"
    prefix: str = ""
    mirrors: dict[str, str] = Field(default_factory=dict)
    digests: dict[str, str] = Field(default_factory=dict)
    require_digest: bool = False

    @field_validator("pull", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: "missing", False: "never"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("prefix")
    @classmethod
    def _a_prefix(cls, value: str) -> str:
        return _place(value) if value else value

    @field_validator("mirrors")
    @classmethod
    def _places(cls, value: dict[str, str]) -> dict[str, str]:
        return {host: _place(place) for host, place in value.items()}

    @field_validator("digests")
    @classmethod
    def _contents(cls, value: dict[str, str]) -> dict[str, str]:
        contents = {}
        for name, digest in value.items():
            if not DIGEST.fullmatch(digest):
                raise ValueError(f"{digest!r} of {name} is no digest; it reads like sha256: and 64 hexadecimal digits")
            try:
                reference = ImageReference.parse(name)
            except InvalidInput as error:
                raise ValueError(str(error)) from error
            if reference.digest:
                raise ValueError(f"{name} has a digest already; name the image by its tag")
            contents[reference.normal] = digest
        return contents

    def of_the_agents_own(self) -> ImagePolicy:
        """What of it holds for the image of pause containers, which no pipeline names: whence it comes, and its digest
        if there is one. A registry is not asked for a newer one each time."""
        pull = "missing" if self.pull == "always" else self.pull
        return self.model_copy(update={"allow": ("*",), "require_digest": False, "pull": pull})

    def check(self, image: str) -> ImageReference:
        """The parts of ``image``. PolicyViolation if it must not run here, InvalidInput if it is no image's name."""
        reference = ImageReference.parse(image)
        if not any(fnmatchcase(image, pattern) for pattern in self.allow):
            raise PolicyViolation(
                f"this node's policy does not allow the image {image}",
                code="image_not_allowed",
                hint=f"images.allow: {', '.join(self.allow) or 'none'}",
            )
        source = self.source_of(reference)
        if self.registries and source.host not in self.registries:
            written = image if source.name == reference.name else f"{image}, pulled as {source}"
            raise PolicyViolation(
                f"this node's policy does not allow images from {source.host} ({written})",
                code="registry_not_allowed",
                hint=f"images.registries: {', '.join(self.registries)}",
            )
        if self.require_digest and not self.digest_of(reference):
            raise PolicyViolation(
                f"this node's policy wants to know the content of every image, and of {image} it does not",
                code="digest_required",
                hint=f"write {reference.name}@sha256:…, or put {image} under images.digests",
            )
        return reference

    def source_of(self, reference: ImageReference) -> ImageReference:
        """Where ``reference`` is pulled from."""
        if self.prefix and not reference.registry:
            place = f"{self.prefix}/{reference.path}"
        elif reference.host in self.mirrors:
            place = f"{self.mirrors[reference.host]}/{reference.full_path}"
        else:
            return reference
        tag = f":{reference.tag}" if reference.tag else ""
        digest = f"@{reference.digest}" if reference.digest else ""
        return ImageReference.parse(f"{place}{tag}{digest}")

    def digest_of(self, reference: ImageReference) -> str:
        """The content that ``reference`` must have; "" if nothing says.

        PolicyViolation if the reference has another digest than the policy gives its tag.
        """
        tagged = ImageReference(reference.registry, reference.path, reference.tag) if reference.tag else None
        pinned = self.digests.get((tagged or reference).normal, "")
        if pinned and reference.digest and pinned != reference.digest:
            raise PolicyViolation(
                f"{reference} is not the content that this node's policy gives {tagged}",
                code="digest_not_allowed",
                hint=f"images.digests: {pinned}",
            )
        return reference.digest or pinned


def _place(value: str) -> str:
    """A registry, or a path in one, as it stands before a name."""
    place = value.strip().rstrip("/")
    if "://" in place:
        raise ValueError(f"{value!r} has a scheme; it reads like registry.lan:5000 or registry.lan/games")
    try:
        parsed = ImageReference.parse(f"{place}/x")
    except InvalidInput as error:
        raise ValueError(f"{value!r} can't stand before an image's name; it reads like registry.lan:5000") from error
    if parsed.tag or parsed.digest:
        raise ValueError(f"{value!r} is an image; give the registry, like registry.lan:5000 or registry.lan/games")
    return place
