"""Parameters and outputs of the HTTP steps.

The server checks a pipeline against the JSON Schemas of these models and has nothing else, so every rule
stands in the schema too.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
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

_NO_AUTHORITY_PATTERN = r"^[Hh][Tt][Tt][Pp]://[^/@?#\s]+/?$"
_PROXY_RULE = "must read like http://proxy:3128, without user:password@ and path"


def _check_proxy(url: str) -> str:
    if not re.search(_NO_AUTHORITY_PATTERN, url):
        raise ValueError(_PROXY_RULE)
    return url


Proxy = Annotated[
    str,
    AfterValidator(_check_proxy),
    WithJsonSchema(
        {"type": "string", "maxLength": 1024, "pattern": _NO_AUTHORITY_PATTERN, "x-outrider-message": _PROXY_RULE}
    ),
]

_AUTH_HEADER_RULE = "must be the name of a header that carries a credential, such as X-Api-Key"
_AUTH_HEADER_REFUSED = f"^({_in_any_case(_OURS)})$"


def _check_auth_header(name: str) -> str:
    if not re.fullmatch(_NAME_PATTERN, name) or name.lower() in _OURS:
        raise ValueError(_AUTH_HEADER_RULE)
    return name


AuthHeader = Annotated[
    str,
    AfterValidator(_check_auth_header),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": _NAME_PATTERN,
            "not": {"pattern": _AUTH_HEADER_REFUSED},
            "x-outrider-message": _AUTH_HEADER_RULE,
        }
    ),
]


def _digest(bits: int) -> Any:
    pattern = f"^[0-9a-fA-F]{{{bits // 4}}}$"
    rule = f"must be a SHA-{bits}: {bits // 4} hexadecimal digits, not {{value}}"
    schema = WithJsonSchema({"type": "string", "pattern": pattern, "x-outrider-message": rule})
    return Annotated[str, StringConstraints(pattern=pattern), schema]


Sha256: Any = _digest(256)
Sha512: Any = _digest(512)
_FORM_TEXT = r"^[^\r\n\u0000]*$"
FormText = Annotated[str, StringConstraints(pattern=_FORM_TEXT, max_length=8192)]
FormName = Annotated[str, StringConstraints(pattern=_FORM_TEXT, min_length=1, max_length=256)]


class TransferParams(BaseModel):
    """What both steps take."""

    # hide_input_in_errors: pydantic repeats a refused value, and a refused address may hold a password.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: Url
    sha256: Sha256 | SkipJsonSchema[None] = Field(
        default=None, description="What the content has to be", json_schema_extra=_without_default
    )
    sha512: Sha512 | SkipJsonSchema[None] = Field(
        default=None, description="What the content has to be", json_schema_extra=_without_default
    )
    headers: Headers = Field(
        default_factory=dict, description="Sent to the given origin only; credentials come from the envs"
    )
    auth_header: AuthHeader | SkipJsonSchema[None] = Field(
        default=None,
        description="The header that carries the env HTTP_AUTH_VALUE, such as X-Api-Key",
        json_schema_extra=_without_default,
    )
    proxy: Proxy | SkipJsonSchema[None] = Field(
        default=None,
        description="An HTTP proxy to go through; its credentials are the envs HTTP_PROXY_USER and HTTP_PROXY_PASSWORD",
        json_schema_extra=_without_default,
    )
    ca: ReadPath | SkipJsonSchema[None] = Field(
        default=None,
        description="A file with the certificate of one's own authority (PEM), instead of the env HTTP_CA",
        json_schema_extra=_without_default,
    )
    limit_bytes_per_s: Annotated[int, Field(ge=65536)] | SkipJsonSchema[None] = Field(
        default=None, description="How fast it may be, in bytes a second", json_schema_extra=_without_default
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
    connections: Annotated[int, Field(ge=1, le=16)] = Field(
        default=4, description="At most so many at once, where the server gives ranges and one alone takes its time"
    )
    digests: Annotated[list[Literal["sha256", "sha512"]], Field(max_length=2)] = Field(
        default=["sha256"], description="Which checksums are outputs, beside those that are compared"
    )


class Form(BaseModel):
    """A form (multipart/form-data) of which the file is one field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: FormName = Field(description="The name of the field that has the file")
    filename: FormName | SkipJsonSchema[None] = Field(
        default=None, description="What the file is called; default: its own name", json_schema_extra=_without_default
    )
    content_type: Annotated[str, StringConstraints(pattern=r"^[!-~]+/[ -~]+$", max_length=256)] = (
        "application/octet-stream"
    )
    fields: dict[FormName, FormText] = Field(default_factory=dict, description="Further fields, before the file")


class UploadParams(TransferParams):
    """``with:`` of ``http.upload``."""

    # A rule over two fields, said in the schema as well.
    model_config = ConfigDict(
        json_schema_extra={
            "not": {"required": ["form", "method"], "properties": {"method": {"const": "PUT"}}},
            "x-outrider-message": "a form is sent with POST: leave `method` out, or say POST",
        }
    )

    from_: ReadPath = Field(alias="from", description="The file to send")
    method: Literal["PUT", "POST"] | SkipJsonSchema[None] = Field(
        default=None, description="PUT, or POST where there is a form", json_schema_extra=_without_default
    )
    form: Form | SkipJsonSchema[None] = Field(
        default=None,
        description="Send the file as a field of a form, by POST",
        json_schema_extra=_without_default,
    )

    @model_validator(mode="after")
    def _forms_are_posted(self) -> UploadParams:
        if self.form is not None and self.method == "PUT":
            raise ValueError("a form is sent with POST: leave `method` out, or say POST")
        return self


class DownloadOutputs(BaseModel):
    """``steps.*.outputs`` of ``http.download``."""

    model_config = ConfigDict(extra="forbid")

    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256 | None = Field(default=None, description="Unless `digests` leaves it out")
    sha512: Sha512 | None = Field(default=None, description="If it was compared, or asked for by `digests`")
    etag: str | None = Field(default=None, description="The server's tag of the content, if it gave one")


class UploadOutputs(BaseModel):
    """``steps.*.outputs`` of ``http.upload``."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="The file that was sent")
    bytes: Annotated[int, Field(ge=0)] = Field(description="Of the file, without the form around it")
    sha256: Sha256
    sha512: Sha512 | None = Field(default=None, description="If it was compared")
    status: Annotated[int, Field(ge=200, le=399)] = Field(description="The server's answer")
    etag: str | None = None
