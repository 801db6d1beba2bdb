"""s3.download: fetch what is not there yet, check all of it, and only then publish."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outrider_stepkit import Selection, StepFailure, free_bytes
from outrider_stepkit.meter import Meter, Report
from outrider_stepkit.publish import move_all, recover, sync_directory

from s3_transfer.api import Api, Version
from s3_transfer.checks import compare, md5_of
from s3_transfer.disk import sync_files
from s3_transfer.errors import Refused
from s3_transfer.fetching import Fetcher, Job
from s3_transfer.marks import digests_of, mark, marked
from s3_transfer.objects import list_objects, listing_sha256
from s3_transfer.pace import Pace
from s3_transfer.partial import Partials, partials
from s3_transfer.settings import Settings
from s3_transfer.workers import Workers

_AT_FIRST = 2
"""Connections until it shows that the store, or the way to it, is what is waited for."""
_NOTHING_PUBLISHED = "nothing was published"


def download(params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Fetch what ``params`` names; the outputs of the step.

    Raises StepFailure or OSError; then nothing has changed at the target.
    """
    return _Download(params, env, report).run()


class _Download:
    def __init__(self, params: Mapping[str, Any], env: Mapping[str, str], report: Report) -> None:
        self._settings = Settings.read(params, env)
        self._pace = Pace.read(params)
        self._api = Api(self._settings, self._pace.connections)
        self._params = params
        self._expected: str | None = params.get("sha256")
        self._report = report

    def run(self) -> dict[str, Any]:
        if self._params.get("key") is not None:
            return self._object(self._params["key"], self._params["to"])
        return self._prefix(self._params["prefix"], self._params["to"])

    def _object(self, key: str, to: str) -> dict[str, Any]:
        target = os.path.join(to, key.rsplit("/", 1)[-1]) if to.endswith("/") else to
        if os.path.isdir(target):
            raise StepFailure(
                f"{target} is a directory: name the file, or end 'to' with a slash to keep the object's name",
                code="is_a_directory",
            )
        with Workers(self._pace.connections, at_first=_AT_FIRST) as workers:
            versions: list[Version] = []
            workers.persist(lambda: versions.append(self._look(key)), lambda: len(versions))
            version = versions[0]
            job = Job(key, target, version, self._identity(key, version), self._expected, True)
            digest = self._here(job, target)
            if digest is None:
                with partials(Path(target), directory=False) as kept:
                    kept.keep_only({job.identity})
                    _check_room(kept, version.size)
                    ((_, digest),) = self._fetch([job], kept, workers, version.size)
                    compare(f"{self._what(key)}", digest, self._expected, _NOTHING_PUBLISHED)
                    _publish_file(kept, job, digest)
                moved = 1
            else:
                moved = 0
        return {
            "path": target,
            "bytes": version.size,
            "sha256": digest,
            "objects": 1,
            "transferred": moved,
            "etag": version.etag.strip('"') or None,
            "version_id": version.version_id,
        }

    def _prefix(self, prefix: str, to: str) -> dict[str, Any]:
        target = Path(to)
        recover(target)
        if target.exists() and not target.is_dir():
            raise StepFailure(f"{target} is a file: a prefix needs a directory", code="not_a_directory")
        chosen = Selection(self._params.get("include", ()), self._params.get("exclude", ()))
        with Workers(self._pace.connections, at_first=_AT_FIRST) as workers:
            jobs: list[Job] = []

            def look() -> None:
                jobs[:] = [
                    Job(entry.key, entry.name, version, self._identity(entry.key, version))
                    for entry in list_objects(self._api, prefix, chosen)
                    for version in [Version(entry.size, entry.etag)]
                ]

            workers.persist(look, lambda: len(jobs))
            digests: dict[str, str] = {}
            for job in jobs:
                if (digest := self._here(job, os.path.join(to, job.name))) is not None:
                    digests[job.name] = digest
            missing = [job for job in jobs if job.name not in digests]
            total = sum(job.version.size for job in jobs)
            what = f"prefix {prefix!r} of bucket {self._settings.bucket!r} at {self._settings.shown}"
            if not missing:
                compare(what, listing_sha256(digests.items()), self._expected, _NOTHING_PUBLISHED)
            else:
                with partials(target, directory=True) as kept:
                    kept.keep_only({job.identity for job in missing})
                    _check_room(kept, sum(job.version.size for job in missing))
                    for job, digest in self._fetch(missing, kept, workers, total):
                        digests[job.name] = digest
                    compare(what, listing_sha256(digests.items()), self._expected, _NOTHING_PUBLISHED)
                    sync_files(kept.path(job.identity) for job in missing)
                    _publish(missing, digests, kept, target)
        return {
            "path": str(target),
            "bytes": total,
            "sha256": listing_sha256(digests.items()),
            "objects": len(jobs),
            "transferred": len(missing),
        }

    def _fetch(self, jobs: list[Job], kept: Partials, workers: Workers, total: int) -> list[tuple[Job, str]]:
        meter = Meter(total, self._report, limit=self._pace.limit, stop=workers.stop)
        meter.skip(total - sum(job.version.size for job in jobs))
        service = bool(self._params.get("service_checksums", True))
        fetcher = Fetcher(self._api, kept, workers, meter, pace=self._pace, service=service)
        return list(fetcher.fetch(jobs))

    def _look(self, key: str) -> Version:
        version_id = self._params.get("version_id")
        try:
            found = self._api.head(key, version_id)
        except Refused as refused:
            if refused.temporary:
                raise
            # The answer to HEAD has no body, so the reason is only told to who asks for a byte.
            with self._api.get(key, version_id, start=0, end=0) as answer:
                found = Version.of(answer.headers)
        if found.size < 0:
            raise StepFailure(f"{self._what(key)} has no size: is the endpoint that of an S3 store?", code="not_s3")
        return found

    def _here(self, job: Job, path: str) -> str | None:
        """The SHA-256 of the file at ``path`` if it is the object already."""
        if not self._params.get("only_differences", True):
            return None
        known = marked(path, job.identity)
        if known is not None and self._expected is None:
            return known
        # What the caller gave a checksum for is read, and so is a file that we know nothing of.
        try:
            if os.lstat(path).st_size != job.version.size:
                return None
        except OSError:
            return None
        md5 = md5_of(job.version)
        if known is None and md5 is None:
            return None
        found = digests_of(path, "sha256", *([] if known is not None else ["md5"]))
        if found is None or found[-1] != (known if known is not None else md5):
            return None
        if job.expected is not None and found[0] != job.expected.lower():
            return None
        return found[0]

    def _identity(self, key: str, version: Version) -> str:
        """Names the bytes of an object, across attempts and runs. Without a tag of the store they have no name."""
        tag = version.etag or version.version_id or secrets.token_hex(8)
        place = f"{self._settings.scheme}://{self._settings.host}{self._settings.path(key)}"
        return Version(version.size, f"{place} {tag}", version.version_id).identity

    def _what(self, key: str) -> str:
        return f"{self._settings.object(key)} at {self._settings.shown}"


def _publish_file(kept: Partials, job: Job, digest: str) -> None:
    path = kept.path(job.identity)
    sync_files([path])
    mark(path, job.identity, digest)
    os.replace(path, job.name)
    sync_directory(Path(job.name).parent)


def _publish(jobs: list[Job], digests: Mapping[str, str], kept: Partials, target: Path) -> None:
    """Move every file to its place. What can be foreseen to fail is looked for before the first one moves.

    From then on a cancellation waits, and after a kill the next attempt moves the rest.
    """
    directories = {(target / job.name).parent for job in jobs}
    for directory in directories:
        blocked = next((up for up in (directory, *directory.parents) if up.exists() and not up.is_dir()), None)
        if blocked:
            raise StepFailure(f"{blocked} is a file, and objects have to be written below it", code="not_a_directory")
    for job in jobs:
        path = target / job.name
        if path.is_dir() and not path.is_symlink():
            raise StepFailure(f"{path} is a directory, and an object has to be written there", code="is_a_directory")
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        mark(kept.path(job.identity), job.identity, digests[job.name])
    move_all(kept.folder, target, ((job.identity, job.name) for job in jobs))


def _check_room(kept: Partials, size: int) -> None:
    missing, free = size - kept.used_bytes(), free_bytes(kept.folder)
    if missing > free:
        raise StepFailure(
            f"{missing} bytes are to be downloaded and the volume has room for {free}: give it a larger size",
            code="volume_full",
        )
