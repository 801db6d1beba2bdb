"""s3.upload: send files so that an object appears whole or not at all, and leave alone what is there already."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from outrider_stepkit import Selection, StepFailure
from outrider_stepkit.meter import Meter, Report

from s3_transfer.api import Api, Version
from s3_transfer.checks import compare
from s3_transfer.errors import Refused
from s3_transfer.files import File
from s3_transfer.objects import Entry, folder, list_files, listing_sha256
from s3_transfer.pace import Pace
from s3_transfer.sending import NOTHING_SENT, Sender, Sent
from s3_transfer.settings import Settings
from s3_transfer.terms import PART_BYTES, Terms, part_bytes
from s3_transfer.workers import Workers


def upload(params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Send what ``params`` names; the outputs of the step.

    Raises StepFailure or OSError; the object that could not be sent is then as it was.
    """
    return _Upload(params, env, report).run()


def _terms(params: Mapping[str, Any], settings: Settings, env: Mapping[str, str]) -> Terms:
    headers: dict[str, str] = {}
    if storage_class := params.get("storage_class"):
        headers["x-amz-storage-class"] = storage_class
    encryption = params.get("encryption")
    if encryption:
        if settings.customer_key:
            raise StepFailure("give either 'encryption' or the env S3_SSE_CUSTOMER_KEY", code="invalid_request")
        headers["x-amz-server-side-encryption"] = encryption
        if key_id := params.get("kms_key_id"):
            headers["x-amz-server-side-encryption-aws-kms-key-id"] = key_id
    checksum = params.get("checksum", "auto")
    return Terms(
        headers,
        params.get("tags") or {},
        {"auto": "crc64nvme", "none": None}.get(checksum, checksum),
        checksum == "auto",
        params.get("overwrite", True),
        params.get("if_etag"),
        params.get("if_unchanged", False),
        settings.customer_key,
        # Outside of a run there is no next attempt: a name that is never the same again.
        f"{env.get('OUTRIDER_RUN_ID') or secrets.token_hex(16)} {env.get('OUTRIDER_STEP', '')}",
    )


class _Upload:
    def __init__(self, params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> None:
        self._settings = Settings.read(params, env)
        self._pace = Pace.read(params)
        self._api = Api(self._settings, self._pace.connections)
        self._params, self._report = params, report
        self._terms = _terms(params, self._settings, env)
        self._expected: str | None = params.get("sha256")
        self._differences = bool(params.get("only_differences", True))

    def run(self) -> dict[str, Any]:
        if self._params.get("key") is not None:
            return self._object(self._params["key"], self._params["from"])
        return self._prefix(self._params["prefix"], self._params["from"])

    def _object(self, key: str, source: str) -> dict[str, Any]:
        if os.path.isdir(source):
            raise StepFailure(
                f"{source} is a directory: send it with 'prefix' instead of 'key', or pack it with archive.create",
                code="is_a_directory",
            )
        file = File.open(source, key)
        with Workers(self._pace.connections) as workers:
            sender = self._sender(workers, file.size)
            if file.size <= PART_BYTES:
                sent = workers.submit(partial(sender.put, source, key, file.size, self._expected)).result()
            else:
                sent = sender.send(file, self._expected)
        return {
            "path": source,
            "bytes": file.size,
            "sha256": sent.sha256,
            "objects": 1,
            "transferred": 1,
            "etag": sent.version.etag.strip('"') or None,
            "version_id": sent.version.version_id,
        }

    def _prefix(self, prefix: str, source: str) -> dict[str, Any]:
        if os.path.lexists(source) and not os.path.isdir(source):
            raise StepFailure(
                f"{source} is not a directory: send it with 'key' instead of 'prefix'", code="not_a_directory"
            )
        chosen = Selection(self._params.get("include", ()), self._params.get("exclude", ()))
        entries = list_files(source, prefix, chosen)
        checked: dict[str, str] = {}
        with Workers(self._pace.connections) as workers:
            if self._expected is not None:
                # All of it is read before any of it is sent: objects that were sent can't be taken back.
                for entry in entries:
                    checked[entry.name] = self._hashed(source, entry)
                compare(source, listing_sha256(checked.items()), self._expected, NOTHING_SENT)
            there = self._there(prefix, workers)
            sender = self._sender(workers, sum(entry.size for entry in entries))
            digests: dict[str, str] = {}
            moved = 0
            under_way: deque[tuple[Entry, Future[tuple[str, bool]]]] = deque()

            def settle() -> None:
                nonlocal moved
                entry, future = under_way.popleft()
                digests[entry.name], was_sent = future.result()
                moved += was_sent

            for entry in entries:
                known = checked.get(entry.name)
                if entry.size <= PART_BYTES:
                    send = partial(self._send_small, sender, source, entry, there.get(entry.key), known)
                    under_way.append((entry, workers.submit(send)))
                else:
                    digests[entry.name], was_sent = self._send_large(sender, source, entry, there.get(entry.key), known)
                    moved += was_sent
                while len(under_way) > 2 * self._pace.connections:
                    settle()
            while under_way:
                settle()
        return {
            "path": source,
            "bytes": sum(entry.size for entry in entries),
            "sha256": listing_sha256(digests.items()),
            "objects": len(entries),
            "transferred": moved,
        }

    def _sender(self, workers: Workers, total: int) -> Sender:
        meter = Meter(total, self._report, limit=self._pace.limit, stop=workers.stop)
        return Sender(self._api, self._terms, workers, meter, self._pace)

    def _there(self, prefix: str, workers: Workers) -> dict[str, Version]:
        """What the store has below the prefix, if that matters; nothing if it does not tell."""
        if not self._differences and not self._terms.if_unchanged:
            return {}
        found: dict[str, Version] = {}

        def look() -> None:
            found.clear()
            for item in self._api.listing(folder(prefix)):
                found[item.key] = Version(item.size, item.etag)

        try:
            workers.persist(look, lambda: len(found))
        except StepFailure as failure:
            if failure.code != "denied" or self._terms.if_unchanged:  # who may write may not always list
                raise
            return {}
        return found

    def _send_small(
        self, sender: Sender, source: str, entry: Entry, there: Version | None, expected: str | None
    ) -> tuple[str, bool]:
        if (digest := self._same(sender, source, entry, there)) is not None:
            return digest, False
        return sender.put(os.path.join(source, entry.name), entry.key, entry.size, expected, there).sha256, True

    def _send_large(
        self, sender: Sender, source: str, entry: Entry, there: Version | None, expected: str | None
    ) -> tuple[str, bool]:
        if (digest := self._same(sender, source, entry, there)) is not None:
            return digest, False
        file = File.open(os.path.join(source, entry.name), entry.key, entry.size)
        sent: Sent = sender.send(file, expected, there)
        return sent.sha256, True

    def _same(self, sender: Sender, source: str, entry: Entry, there: Version | None) -> str | None:
        """The file's SHA-256 if the store has it already, by its size and its tag; None if not, or not surely."""
        if there is None or there.size != entry.size or not self._differences:
            return None
        file = File.open(os.path.join(source, entry.name), entry.key, entry.size)
        if file.tag(self._parts_of(sender, entry) if "-" in there.etag else None) != there.etag.strip('"').lower():
            return None
        sha256 = hashlib.sha256()
        file.digest(0, entry.size, sha256)
        sender.meter.skip(entry.size)
        return sha256.hexdigest()

    def _parts_of(self, sender: Sender, entry: Entry) -> int | None:
        """How large the parts of an object are that the store has."""
        found: list[Version] = []
        try:
            sender.workers.persist(lambda: found.append(sender.api.head(entry.key)), lambda: len(found))
        except Refused as refused:  # who may list and write may not always look
            if refused.temporary:
                raise
        return (found[0].part_bytes if found else None) or part_bytes(entry.size)

    def _hashed(self, source: str, entry: Entry) -> str:
        digest = hashlib.sha256()
        File.open(os.path.join(source, entry.name), entry.key, entry.size).digest(0, entry.size, digest)
        return digest.hexdigest()
