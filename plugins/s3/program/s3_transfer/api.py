"""The calls of S3 that the steps need, each in a few lines; see the API reference of Amazon S3 for what they mean."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree

import urllib3
from outrider_stepkit import StepFailure

from s3_transfer.errors import from_answer
from s3_transfer.settings import Settings
from s3_transfer.transport import Body, Transport

_CHECKSUM_MODE = {"x-amz-checksum-mode": "ENABLED"}
PART_BYTES_HEADER = "x-amz-meta-outrider-part-bytes"
"""Kept with objects of several parts: their tag can't be compared with a file's without it."""


@dataclass(frozen=True, slots=True)
class Version:
    """One state of an object: what has to be the same for two answers to speak of the same bytes."""

    size: int
    etag: str
    """With its quotes, as If-Match wants it; empty where the store gives none."""
    version_id: str | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)
    """By algorithm ("crc64nvme", "sha256"…): base64, with ``-N`` behind it where it is one of N parts' checksums."""
    encryption: str | None = None
    """The header's value, or "customer" for a key of the customer's."""
    kms_key_id: str | None = None
    part_bytes: int | None = None
    """How large its parts are, where it was this program that sent them."""

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Version:
        """What an answer's headers say about its object."""
        content_range = headers.get("content-range")
        size = content_range.rpartition("/")[2] if content_range else headers.get("content-length", "")
        version = headers.get("x-amz-version-id")
        prefix = "x-amz-checksum-"
        checksums = {
            name.lower().removeprefix(prefix): value
            for name, value in headers.items()
            if name.lower().startswith(prefix) and not name.lower().endswith(("-type", "-mode"))
        }
        return cls(
            size=int(size) if size.isdigit() else -1,
            etag=headers.get("etag", ""),
            version_id=None if version in (None, "null") else version,
            checksums=checksums,
            encryption=headers.get("x-amz-server-side-encryption")
            or ("customer" if headers.get("x-amz-server-side-encryption-customer-algorithm") else None),
            kms_key_id=headers.get("x-amz-server-side-encryption-aws-kms-key-id"),
            part_bytes=int(parts) if (parts := headers.get(PART_BYTES_HEADER, "")).isdigit() else None,
        )

    @property
    def identity(self) -> str:
        """Names the bytes as exactly as the store can."""
        return hashlib.sha256(f"{self.size} {self.etag} {self.version_id}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Listed:
    """An object as a listing has it."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a multipart upload that the store has."""

    number: int
    size: int
    etag: str
    checksums: Mapping[str, str] = field(default_factory=dict)


class Api:
    """One bucket. Every method raises StepFailure; ``Refused`` where it was the store that said no."""

    def __init__(self, settings: Settings, connections: int) -> None:
        self.settings = settings
        self.transport = Transport(settings, connections)

    def head(self, key: str, version_id: str | None = None, *, part: int | None = None) -> Version:
        """What the store knows about an object, or about one part of it."""
        query = _version(version_id) | ({"partNumber": str(part)} if part else {})
        headers = _CHECKSUM_MODE | self.settings.customer_headers
        found, _ = self.transport.call("HEAD", key, query, headers, what=self.settings.object(key))
        return Version.of(found)

    def get(
        self, key: str, version_id: str | None = None, *, start: int = 0, end: int | None = None, etag: str = ""
    ) -> urllib3.BaseHTTPResponse:
        """The bytes from ``start`` to ``end``, that one included, or to the object's end; if it still is ``etag``."""
        headers = dict(self.settings.customer_headers)
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end}"
        else:
            headers |= _CHECKSUM_MODE
        if etag:
            headers["If-Match"] = etag
        return self.transport.open("GET", key, _version(version_id), headers)

    def listing(self, prefix: str) -> Iterator[Listed]:
        """Every object whose key begins with ``prefix``, in the order of the store."""
        query = {"list-type": "2", "prefix": prefix, "encoding-type": "url", "max-keys": "1000"}
        what = f"prefix {prefix!r} of bucket {self.settings.bucket!r}"
        while True:
            page = self._document("GET", "", query, what=what)
            decode = unquote_plus if page.findtext("{*}EncodingType") == "url" else str
            for item in page.iterfind("{*}Contents"):
                yield Listed(decode(_text(item, "Key")), int(_text(item, "Size")), _text(item, "ETag"))
            token = page.findtext("{*}NextContinuationToken")
            if page.findtext("{*}IsTruncated") != "true" or not token:
                return
            query["continuation-token"] = token

    def put(self, key: str, body: Body, headers: Mapping[str, str], *, sha256: str | None = None) -> Version:
        """Write a whole object. ``headers`` have its Content-Length."""
        what = self.settings.object(key)
        sent = {**headers, **self.settings.customer_headers}
        answered, _ = self.transport.call("PUT", key, None, sent, body, sha256=sha256, what=what)
        return Version.of(answered)

    def create_upload(self, key: str, headers: Mapping[str, str]) -> str:
        """Begin a multipart upload; its id."""
        sent = {**headers, **self.settings.customer_headers}
        document = self._document("POST", key, {"uploads": ""}, sent, what=self.settings.object(key))
        return _text(document, "UploadId")

    def upload_part(
        self,
        key: str,
        upload_id: str,
        number: int,
        body: Body,
        headers: Mapping[str, str],
        *,
        sha256: str | None = None,
    ) -> tuple[Part, Version]:
        """Send a part; its tag and the checksums that the store took of it, and all that it said."""
        query = {"partNumber": str(number), "uploadId": upload_id}
        sent = {**headers, **self.settings.customer_headers}
        answered, _ = self.transport.call("PUT", key, query, sent, body, sha256=sha256, what=self.settings.object(key))
        version = Version.of(answered)
        return Part(number, int(headers["Content-Length"]), version.etag, version.checksums), version

    def complete_upload(self, key: str, upload_id: str, parts: list[Part], headers: Mapping[str, str]) -> Version:
        """Put the parts together: only now is there an object."""
        root = ElementTree.Element("CompleteMultipartUpload", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
        for part in parts:
            item = ElementTree.SubElement(root, "Part")
            ElementTree.SubElement(item, "PartNumber").text = str(part.number)
            ElementTree.SubElement(item, "ETag").text = part.etag
            for algorithm, value in part.checksums.items():
                ElementTree.SubElement(item, f"Checksum{algorithm.upper()}").text = value
        body = ElementTree.tostring(root)
        sent = {"Content-Type": "application/xml", **headers, **self.settings.customer_headers}
        what = self.settings.object(key)
        answered, text = self.transport.call("POST", key, {"uploadId": upload_id}, sent, body, what=what)
        # A store that takes its time answers 200 before it knows; how it went is in the body.
        document = self._parsed(text, answered, what)
        etag = document.findtext("{*}ETag") or ""
        found = Version.of(answered)
        return replace(found, etag=etag, checksums=_checksums(document))

    def delete(self, key: str, version: Version) -> None:
        """Remove an object that was just written. Where nothing else tells it apart, only while it has its tag."""
        headers = {} if version.version_id else {"If-Match": version.etag}
        self.transport.call("DELETE", key, _version(version.version_id), headers, what=self.settings.object(key))

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Give the parts up: they would be kept, and paid for, without being seen."""
        self.transport.call("DELETE", key, {"uploadId": upload_id}, what=self.settings.object(key))

    def unfinished_uploads(self, key: str) -> list[str]:
        """The ids of the uploads of this key that were begun and not ended, the newest first."""
        found: list[tuple[str, str]] = []
        query = {"uploads": "", "prefix": key, "encoding-type": "url"}
        page = self._document("GET", "", query, what=self.settings.object(key))
        decode = unquote_plus if page.findtext("{*}EncodingType") == "url" else str
        for item in page.iterfind("{*}Upload"):
            if decode(_text(item, "Key")) == key:
                found.append((item.findtext("{*}Initiated") or "", _text(item, "UploadId")))
        return [upload_id for _, upload_id in sorted(found, reverse=True)]

    def parts(self, key: str, upload_id: str) -> Iterator[Part]:
        """What an upload has so far."""
        query = {"uploadId": upload_id}
        while True:
            page = self._document("GET", key, query, self.settings.customer_headers, what=self.settings.object(key))
            for item in page.iterfind("{*}Part"):
                number, size = int(_text(item, "PartNumber")), int(_text(item, "Size"))
                yield Part(number, size, _text(item, "ETag"), _checksums(item))
            marker = page.findtext("{*}NextPartNumberMarker")
            if page.findtext("{*}IsTruncated") != "true" or not marker:
                return
            query["part-number-marker"] = marker

    def _document(self, *args: Any, what: str, **options: Any) -> ElementTree.Element:
        headers, body = self.transport.call(*args, what=what, **options)
        return self._parsed(body, headers, what)

    def _parsed(self, body: bytes, headers: Mapping[str, str], what: str) -> ElementTree.Element:
        try:
            root = ElementTree.fromstring(body)  # noqa: S314  # expat 2.4 and later stop entities that multiply
        except ElementTree.ParseError as error:
            raise StepFailure(
                f"{self.settings.shown} answered about {what} with something that is not S3's XML: "
                "is the endpoint that of an S3-compatible store?",
                code="not_s3",
            ) from error
        if root.tag.rpartition("}")[2] == "Error":
            raise from_answer(
                500 if root.findtext("{*}Code") == "InternalError" else 400,
                body,
                headers,
                what=what,
                bucket=self.settings.bucket,
                endpoint=self.settings.shown,
            )
        return root


def _version(version_id: str | None) -> dict[str, str]:
    return {"versionId": version_id} if version_id else {}


def _text(item: ElementTree.Element, name: str) -> str:
    return item.findtext(f"{{*}}{name}") or ""


def _checksums(item: ElementTree.Element) -> dict[str, str]:
    prefix = "Checksum"
    return {
        tag.removeprefix(prefix).lower(): child.text or ""
        for child in item
        if (tag := child.tag.rpartition("}")[2]).startswith(prefix) and tag not in {"ChecksumType", "ChecksumAlgorithm"}
    }
