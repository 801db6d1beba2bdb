"""Parameters and outputs of the S3 steps.

The server checks a pipeline against the JSON Schemas of these models and has nothing else, so every rule
stands in the schema too, also those between fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator
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


_EXTRA: dict[str, Any] = {
    "oneOf": [{"required": ["key"]}, {"required": ["prefix"]}],
    "x-outrider-message": _KEY_OR_PREFIX,
}


def _without_default(schema: dict[str, Any]) -> None:
    """An absent field is absent: no ``"default": null`` where the schema allows no null."""
    schema.pop("default", None)


Bucket = Annotated[str, _checked(_BUCKET_PATTERN, _BUCKET_RULE), _schema(_BUCKET_PATTERN, _BUCKET_RULE)]
Key = Annotated[str, _checked(_KEY_PATTERN, _KEY_RULE), _schema(_KEY_PATTERN, _KEY_RULE)]
Prefix = Annotated[str, _checked(_PREFIX_PATTERN, _PREFIX_RULE), _schema(_PREFIX_PATTERN, _PREFIX_RULE)]
Endpoint = Annotated[str, _checked(_ENDPOINT_PATTERN, _ENDPOINT_RULE), _schema(_ENDPOINT_PATTERN, _ENDPOINT_RULE)]
Region = Annotated[str, _checked(_REGION_PATTERN, _REGION_RULE), _schema(_REGION_PATTERN, _REGION_RULE)]
Sha256 = Annotated[str, _checked(_SHA256_PATTERN, _SHA256_RULE), _schema(_SHA256_PATTERN, _SHA256_RULE)]


Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512)]
TagName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,128}$")]
TagValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,256}$")]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=200)]
Version = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,1024}$")]
_FOR_PREFIXES = "'include' and 'exclude' choose among the files of a 'prefix': a 'key' has nothing to choose from"
_NAME_OF_A_DOWNLOAD = "'file_name' is what a download is saved as: it has no meaning for 'action: put'"
_FOR_KEYS = "it speaks of one object: give its 'key', not a 'prefix'"


class StoreParams(BaseModel):
    """Which bucket, and how it is reached."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bucket: Bucket
    endpoint: Endpoint | SkipJsonSchema[None] = Field(
        default=None, description="Instead of S3_ENDPOINT", json_schema_extra=_without_default
    )
    region: Region | SkipJsonSchema[None] = Field(
        default=None, description="Instead of S3_REGION", json_schema_extra=_without_default
    )
    addressing: Literal["auto", "path", "virtual"] = Field(
        default="auto",
        description="Where the bucket stands: in the path, or before the host's name; auto: there for AWS, in the path "
        "for an endpoint of your own",
    )


class TransferParams(StoreParams):
    """What download and upload take."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={**_EXTRA, "dependentRequired": {"include": ["prefix"], "exclude": ["prefix"]}},
    )

    key: Key | SkipJsonSchema[None] = Field(
        default=None, description="The one object to transfer", json_schema_extra=_without_default
    )
    prefix: Prefix | SkipJsonSchema[None] = Field(
        default=None,
        description="Everything below this folder; 'a/b' means 'a/b/', the empty string the whole bucket",
        json_schema_extra=_without_default,
    )
    include: Patterns = Field(
        default=(), description="Only what one of these patterns matches, read as in .gitignore; all without one"
    )
    exclude: Patterns = Field(default=(), description="And of that nothing that one of these matches")
    only_differences: bool = Field(
        default=True, description="What is at the other side already, with the same content, is not transferred again"
    )
    sha256: Sha256 | SkipJsonSchema[None] = Field(
        default=None,
        description="What the content has to be; for a prefix, the digest of its sha256sum listing",
        json_schema_extra=_without_default,
    )
    connections: Annotated[int, Field(ge=1, le=64)] = Field(default=8, description="How many requests run at once")
    limit_bytes_per_s: Annotated[int, Field(ge=65_536)] | SkipJsonSchema[None] = Field(
        default=None, description="No faster than this, over all connections", json_schema_extra=_without_default
    )
    idle_timeout_s: Annotated[float, Field(ge=1, le=3600)] = Field(
        default=60, description="How long the store may be silent before a request is given up"
    )

    @model_validator(mode="after")
    def _one_of_key_and_prefix(self) -> Self:
        if (self.key is None) == (self.prefix is None):
            raise ValueError(_KEY_OR_PREFIX)
        if self.key is not None and (self.include or self.exclude):
            raise ValueError(_FOR_PREFIXES)
        return self


class DownloadParams(TransferParams):
    """``with:`` of ``s3.download``."""

    model_config = ConfigDict(
        json_schema_extra={
            **_EXTRA,
            "dependentRequired": {"include": ["prefix"], "exclude": ["prefix"], "version_id": ["key"]},
        }
    )

    to: WritePath = Field(description="The file to write, or the directory: for a prefix, or when it ends with a slash")
    version_id: Version | SkipJsonSchema[None] = Field(
        default=None, description="This version of the object, not its newest", json_schema_extra=_without_default
    )
    service_checksums: bool = Field(
        default=True,
        description="Compare with the checksums that the store keeps, too, where no 'sha256' is given; false is for "
        "stores whose ETags look like MD5 and are something else",
    )

    @model_validator(mode="after")
    def _version_of_a_key(self) -> Self:
        if self.version_id is not None and self.key is None:
            raise ValueError(f"'version_id': {_FOR_KEYS}")
        return self


class UploadParams(TransferParams):
    """``with:`` of ``s3.upload``."""

    model_config = ConfigDict(
        json_schema_extra={
            **_EXTRA,
            "dependentRequired": {
                "include": ["prefix"],
                "exclude": ["prefix"],
                "if_etag": ["key"],
                "if_unchanged": ["prefix"],
                "kms_key_id": ["encryption"],
            },
        }
    )

    from_: ReadPath = Field(alias="from", description="The file to send; the directory for a prefix")
    overwrite: bool = Field(default=True, description="false: an object that is there already fails the step")
    if_etag: Annotated[str, StringConstraints(pattern=r"^[\x21\x23-\x7e]{1,256}$")] | SkipJsonSchema[None] = Field(
        default=None,
        description="Write only over the object with this tag, so that what somebody else has changed is left alone",
        json_schema_extra=_without_default,
    )
    if_unchanged: bool = Field(
        default=False,
        description="With a prefix: write each object only if it is still as it was when the prefix was listed, or "
        "still not there",
    )
    storage_class: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")] | SkipJsonSchema[None] = Field(
        default=None, description="As the store calls it: STANDARD_IA, GLACIER…", json_schema_extra=_without_default
    )
    tags: Annotated[dict[TagName, TagValue], Field(max_length=10)] = Field(
        default_factory=dict, description="Tags of the objects, ten at most"
    )
    encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | SkipJsonSchema[None] = Field(
        default=None,
        description="How the store encrypts it; for a key of your own see S3_SSE_CUSTOMER_KEY",
        json_schema_extra=_without_default,
    )
    kms_key_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:/_-]{1,2048}$")] | SkipJsonSchema[None] = Field(
        default=None, description="Which key of the KMS", json_schema_extra=_without_default
    )
    checksum: Literal["auto", "crc64nvme", "crc32c", "crc32", "sha256", "md5", "none"] = Field(
        default="auto",
        description="What the store is asked to check on arrival; auto: CRC-64/NVME, or MD5 where it is refused",
    )

    @model_validator(mode="after")
    def _conditions(self) -> Self:
        if self.if_etag is not None and self.key is None:
            raise ValueError(f"'if_etag': {_FOR_KEYS}")
        if self.if_unchanged and self.prefix is None:
            raise ValueError("'if_unchanged' is for a 'prefix': for a 'key', give the tag that it has in 'if_etag'")
        if self.kms_key_id is not None and self.encryption is None:
            raise ValueError("'kms_key_id' needs 'encryption: aws:kms'")
        return self


class PresignParams(StoreParams):
    """``with:`` of ``s3.presign``."""

    model_config = ConfigDict(
        json_schema_extra={
            "not": {"required": ["file_name", "action"], "properties": {"action": {"const": "put"}}},
            "x-outrider-message": _NAME_OF_A_DOWNLOAD,
        }
    )

    key: Key = Field(description="The object that the URL is for; it need not be there yet")
    action: Literal["get", "put"] = Field(default="get", description="What the URL lets its holder do")
    expires_s: Annotated[int, Field(ge=1, le=604_800)] = Field(default=3600, description="For how long; 7 days at most")
    version_id: Version | SkipJsonSchema[None] = Field(
        default=None, description="This version of the object, not its newest", json_schema_extra=_without_default
    )
    file_name: Annotated[str, StringConstraints(min_length=1, max_length=255)] | SkipJsonSchema[None] = Field(
        default=None, description="What browsers save it as", json_schema_extra=_without_default
    )
    to: WritePath | SkipJsonSchema[None] = Field(
        default=None,
        description="Write the URL to this file, and not into the outputs, which all who may see the run can read",
        json_schema_extra=_without_default,
    )

    @model_validator(mode="after")
    def _name_of_a_download(self) -> Self:
        if self.file_name is not None and self.action == "put":
            raise ValueError(_NAME_OF_A_DOWNLOAD)
        return self


class TransferOutputs(BaseModel):
    """What download and upload leave behind."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="The file, or the directory for a prefix")
    bytes: Annotated[int, Field(ge=0)] = Field(description="Of all objects, those included that were there already")
    sha256: Sha256 = Field(description="Of the content; for a prefix, of its sha256sum listing")
    objects: Annotated[int, Field(ge=1)] = Field(description="How many there are")
    transferred: Annotated[int, Field(ge=0)] = Field(description="How many of them had to be transferred")
    etag: str | None = Field(default=None, description="The store's tag of the object; absent for a prefix")
    version_id: str | None = Field(default=None, description="Of the object, in a bucket that keeps versions")


class DownloadOutputs(TransferOutputs):
    """``steps.*.outputs`` of ``s3.download``."""


class UploadOutputs(TransferOutputs):
    """``steps.*.outputs`` of ``s3.upload``."""


class PresignOutputs(BaseModel):
    """``steps.*.outputs`` of ``s3.presign``."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["GET", "PUT"]
    expires_at: str = Field(description="When the URL ends, as in 2026-01-31T12:00:00+00:00")
    url: str | None = Field(default=None, description="Absent where it was written to a file")
    path: str | None = Field(default=None, description="The file that it was written to")
