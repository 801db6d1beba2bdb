"""Parameters and outputs of the S3 steps.

The server checks a pipeline against the JSON Schemas of these models and has nothing else, so every rule
stands in the schema too, also those between fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema

from outrider.steps import ReadPath, WritePath

# "." and ".." as parts of a key are legal for S3 but not for URLs: a client that normalises the path asks
# for another object than the one it signed for.
_KEY_PATTERN = r"^(?!(.*/)?\.\.?(/|$))[^\u0000-\u001f\u007f]{0,1023}[^\u0000-\u001f\u007f/]$"
_PREFIX_PATTERN = r"^(?!(.*/)?\.\.?(/|$))[^\u0000-\u001f\u007f]{0,1024}$"
_ENDPOINT_PATTERN = r"^https?://[^/@?#\s]+(/[^@?#\s]*)?$"


def _matches(pattern: str, what: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.search(value):
            raise ValueError(what)
        return value

    return AfterValidator(check)


def _without_default(schema: dict[str, Any]) -> None:
    """An absent field is absent: no ``"default": null`` where the schema allows no null."""
    schema.pop("default", None)


Bucket = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]

Key = Annotated[
    str,
    _matches(_KEY_PATTERN, "is not a key: 1 to 1024 characters, no '.' or '..' between slashes, no slash at the end"),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 1024, "pattern": _KEY_PATTERN}),
]

Prefix = Annotated[
    str,
    _matches(_PREFIX_PATTERN, "is not a prefix: at most 1024 characters, no '.' or '..' between slashes"),
    WithJsonSchema({"type": "string", "maxLength": 1024, "pattern": _PREFIX_PATTERN}),
]

Endpoint = Annotated[str, StringConstraints(pattern=_ENDPOINT_PATTERN)]

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]


class TransferParams(BaseModel):
    """What both steps take."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"oneOf": [{"required": ["key"]}, {"required": ["prefix"]}]},
    )

    bucket: Bucket
    key: Key | SkipJsonSchema[None] = Field(
        default=None, description="The one object to transfer", json_schema_extra=_without_default
    )
    prefix: Prefix | SkipJsonSchema[None] = Field(
        default=None,
        description="Everything below this folder; 'a/b' means 'a/b/', the empty string the whole bucket",
        json_schema_extra=_without_default,
    )
    sha256: Sha256 | SkipJsonSchema[None] = Field(
        default=None,
        description="What the content has to be; for a prefix, the digest of its sha256sum listing",
        json_schema_extra=_without_default,
    )
    endpoint: Endpoint | SkipJsonSchema[None] = Field(
        default=None, description="Instead of S3_ENDPOINT", json_schema_extra=_without_default
    )
    region: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,64}$")] | SkipJsonSchema[None] = Field(
        default=None, description="Instead of S3_REGION", json_schema_extra=_without_default
    )
    idle_timeout_s: Annotated[float, Field(ge=1, le=3600)] = Field(
        default=60, description="How long the store may be silent before a request is given up"
    )

    @model_validator(mode="after")
    def _one_of_key_and_prefix(self) -> TransferParams:
        if (self.key is None) == (self.prefix is None):
            raise ValueError("give either 'key' (one object) or 'prefix' (everything below a folder)")
        return self


class DownloadParams(TransferParams):
    """``with:`` of ``s3.download``."""

    to: WritePath = Field(description="The file to write, or the directory: for a prefix, or when it ends with a slash")


class UploadParams(TransferParams):
    """``with:`` of ``s3.upload``."""

    from_: ReadPath = Field(alias="from", description="The file to send; the directory for a prefix")


class TransferOutputs(BaseModel):
    """What both steps leave behind."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="The file, or the directory for a prefix")
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256 = Field(description="Of the content; for a prefix, of its sha256sum listing")
    objects: Annotated[int, Field(ge=1)] = Field(description="How many objects were transferred")
    etag: str | None = Field(default=None, description="The store's tag of the object; absent for a prefix")


class DownloadOutputs(TransferOutputs):
    """``steps.*.outputs`` of ``s3.download``."""


class UploadOutputs(TransferOutputs):
    """``steps.*.outputs`` of ``s3.upload``."""
