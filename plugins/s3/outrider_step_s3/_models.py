"""Parameters and outputs of the S3 steps.

The server checks a pipeline against the JSON Schemas of these models and has nothing else, so every rule
stands in the schema too, also those between fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema

from outrider.steps import ReadPath, WritePath

# "." and ".." as parts of a key are legal for S3 but not for URLs: a client that normalises the path asks
# for another object than the one it signed for.
_KEY_PATTERN = r"^(?!(.*/)?\.\.?(/|$))[^\u0000-\u001f\u007f]{0,1023}[^\u0000-\u001f\u007f/]$"
_PREFIX_PATTERN = r"^(?!(.*/)?\.\.?(/|$))[^\u0000-\u001f\u007f]{0,1024}$"
_ENDPOINT_PATTERN = r"^https?://[^/@?#\s]+(/[^@?#\s]*)?$"


_KEY_OR_PREFIX = "give either 'key' (one object) or 'prefix' (everything below a folder)"
_KEY_RULE = "must be a key: 1 to 1024 characters, no '.' or '..' between slashes, no slash at the end"
_PREFIX_RULE = "must be a prefix: at most 1024 characters, no '.' or '..' between slashes"
_BUCKET_PATTERN, _BUCKET_RULE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$", "must be the name of a bucket, not {value}"
_REGION_PATTERN, _REGION_RULE = r"^[A-Za-z0-9-]{1,64}$", "must be the name of a region, not {value}"
_SHA256_PATTERN, _SHA256_RULE = r"^[0-9a-fA-F]{64}$", "must be a SHA-256: 64 hexadecimal digits, not {value}"
_ENDPOINT_RULE = "must read like https://host:port, without user and password"


def _checked(pattern: str, rule: str) -> AfterValidator:
    """Checked by a function: pydantic's own patterns know no look-ahead."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.search(value):
            raise ValueError(rule.replace("{value}", repr(value)))
        return value

    return AfterValidator(check)


def _schema(pattern: str, rule: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "x-outrider-message": rule})


def _without_default(schema: dict[str, Any]) -> None:
    """An absent field is absent: no ``"default": null`` where the schema allows no null."""
    schema.pop("default", None)


Bucket = Annotated[str, _checked(_BUCKET_PATTERN, _BUCKET_RULE), _schema(_BUCKET_PATTERN, _BUCKET_RULE)]
Key = Annotated[str, _checked(_KEY_PATTERN, _KEY_RULE), _schema(_KEY_PATTERN, _KEY_RULE)]
Prefix = Annotated[str, _checked(_PREFIX_PATTERN, _PREFIX_RULE), _schema(_PREFIX_PATTERN, _PREFIX_RULE)]
Endpoint = Annotated[str, _checked(_ENDPOINT_PATTERN, _ENDPOINT_RULE), _schema(_ENDPOINT_PATTERN, _ENDPOINT_RULE)]
Region = Annotated[str, _checked(_REGION_PATTERN, _REGION_RULE), _schema(_REGION_PATTERN, _REGION_RULE)]
Sha256 = Annotated[str, _checked(_SHA256_PATTERN, _SHA256_RULE), _schema(_SHA256_PATTERN, _SHA256_RULE)]


class TransferParams(BaseModel):
    """What both steps take."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "oneOf": [{"required": ["key"]}, {"required": ["prefix"]}],
            "x-outrider-message": _KEY_OR_PREFIX,
        },
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
    region: Region | SkipJsonSchema[None] = Field(
        default=None, description="Instead of S3_REGION", json_schema_extra=_without_default
    )
    idle_timeout_s: Annotated[float, Field(ge=1, le=3600)] = Field(
        default=60, description="How long the store may be silent before a request is given up"
    )

    @model_validator(mode="after")
    def _one_of_key_and_prefix(self) -> TransferParams:
        if (self.key is None) == (self.prefix is None):
            raise ValueError(_KEY_OR_PREFIX)
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
