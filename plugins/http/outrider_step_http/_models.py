"""Parameters and outputs of the HTTP steps.

The server checks a pipeline against the JSON Schemas of these models and has nothing else, so every rule
stands in the schema too.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from outrider.steps import ReadPath, WritePath

# No user:password@: an address is stored and shown, credentials come from the step's envs.
_URL_PATTERN = r"^[Hh][Tt][Tt][Pp][Ss]?://[^/@?#\s]+([/?][^#\s]*)?$"

_URL_RULE = "must read like https://host/path, without user:password@, spaces or a #fragment"
_NAME_PATTERN = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$"  # RFC 9110, section 5.6.2
_VALUE_PATTERN = r"^[\t\u0020-\u007e\u0080-\u00ff]*$"
_CREDENTIALS = ("authorization", "cookie", "proxy-authorization")
_OURS = (
    "accept-encoding", "connection", "content-length", "expect", "host", "if-range", "range", "te",
    "transfer-encoding", "upgrade",
)  # fmt: skip


def _in_any_case(names: tuple[str, ...]) -> str:
    """A pattern that JSON Schema's dialect understands, which has no flag for ignoring case."""
    return "|".join("".join(f"[{c.upper()}{c}]" if c.isalpha() else re.escape(c) for c in name) for name in names)


_REFUSED_PATTERN = f"^({_in_any_case(_CREDENTIALS + _OURS)})$"


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    seen: set[str] = set()
    for name, value in headers.items():
        folded = name.lower()
        if not re.fullmatch(_NAME_PATTERN, name):
            raise ValueError(f"{name!r} is not the name of a header")
        if folded in _CREDENTIALS:
            raise ValueError(f"{name!r} is a credential: give it as the env HTTP_TOKEN, or HTTP_USER and HTTP_PASSWORD")
        if folded in _OURS:
            raise ValueError(f"{name!r} is set by the step itself")
        if folded in seen:
            raise ValueError(f"{name!r} is given twice")
        if not re.fullmatch(_VALUE_PATTERN, value):
            raise ValueError(f"the value of {name!r} has characters that a header can't carry")
        seen.add(folded)
    return headers


def _without_default(schema: dict[str, Any]) -> None:
    """An absent field is absent: no ``"default": null`` where the schema allows no null."""
    schema.pop("default", None)


def _check_url(url: str) -> str:
    if not re.search(_URL_PATTERN, url):
        # The value is not repeated: what is wrong with it may be that it has a password in it.
        raise ValueError(_URL_RULE)
    return url


Url = Annotated[
    str,
    AfterValidator(_check_url),
    WithJsonSchema({"type": "string", "maxLength": 8192, "pattern": _URL_PATTERN, "x-outrider-message": _URL_RULE}),
]

Headers = Annotated[
    dict[str, str],
    AfterValidator(_check_headers),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {
                "pattern": _NAME_PATTERN,
                "not": {"pattern": _REFUSED_PATTERN},
                "x-outrider-message": "{value} is no header that can be given: a credential belongs into the envs "
                "(HTTP_TOKEN, or HTTP_USER and HTTP_PASSWORD), and what rules the transfer is set by the step",
            },
            "additionalProperties": {
                "type": "string",
                "pattern": _VALUE_PATTERN,
                "x-outrider-message": "has characters that a header can't carry",
            },
        }
    ),
]

_SHA256_PATTERN = r"^[0-9a-fA-F]{64}$"
_SHA256_RULE = "must be a SHA-256: 64 hexadecimal digits, not {value}"

Sha256 = Annotated[
    str,
    StringConstraints(pattern=_SHA256_PATTERN),
    WithJsonSchema({"type": "string", "pattern": _SHA256_PATTERN, "x-outrider-message": _SHA256_RULE}),
]


class TransferParams(BaseModel):
    """What both steps take."""

    # hide_input_in_errors: pydantic repeats a refused value, and a refused address may hold a password.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: Url
    sha256: Sha256 | SkipJsonSchema[None] = Field(
        default=None, description="What the content has to be", json_schema_extra=_without_default
    )
    headers: Headers = Field(
        default_factory=dict, description="Sent to the given origin only; credentials come from the envs"
    )
    connect_timeout_s: Annotated[float, Field(gt=0, le=300)] = 10
    idle_timeout_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=60, description="How long the server may be silent before a request is given up"
    )


class DownloadParams(TransferParams):
    """``with:`` of ``http.download``."""

    to: WritePath = Field(
        description="The file to write; ends it with a slash, the last part of the address is the name"
    )


class UploadParams(TransferParams):
    """``with:`` of ``http.upload``."""

    from_: ReadPath = Field(alias="from", description="The file to send")
    method: Literal["PUT", "POST"] = "PUT"


class DownloadOutputs(BaseModel):
    """``steps.*.outputs`` of ``http.download``."""

    model_config = ConfigDict(extra="forbid")

    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    etag: str | None = Field(default=None, description="The server's tag of the content, if it gave one")


class UploadOutputs(BaseModel):
    """``steps.*.outputs`` of ``http.upload``."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="The file that was sent")
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    status: Annotated[int, Field(ge=200, le=399)] = Field(description="The server's answer")
    etag: str | None = None
