"""s3.presign: a URL that lets whoever has it fetch or write one object for a while. Nothing is asked of the store."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from outrider_stepkit import StepFailure, staged_file

from s3_transfer.settings import Settings
from s3_transfer.signing import Signer


def presign(params: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """Make the URL; the outputs of the step. With ``to`` it goes into that file, and only there."""
    settings = Settings.read(params, env)
    if settings.credentials is None:
        raise StepFailure(
            "a URL can only be signed with a key pair: allot S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY to the step",
            code="bad_credentials",
        )
    if settings.credentials.token and not params.get("to"):
        # It would be refused by the agent all the same, where it comes from an env set, but not with what to do.
        raise StepFailure(
            "the URL would have S3_SESSION_TOKEN in it, which is not for all who may see the run: write it to a file "
            "with 'to', or sign with a key pair that needs no token",
            code="secret_in_outputs",
        )
    query: dict[str, str] = {}
    if version_id := params.get("version_id"):
        query["versionId"] = version_id
    if name := params.get("file_name"):
        query["response-content-disposition"] = f"attachment; filename*=UTF-8''{quote(name, safe='')}"
    method = {"get": "GET", "put": "PUT"}[params.get("action", "get")]
    expires_s = int(params.get("expires_s", 3600))
    expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=expires_s)
    signer = Signer(settings.credentials, settings.region)
    url = settings.url(params["key"], signer.query(method, settings, params["key"], query, expires_s))
    outputs: dict[str, Any] = {"method": method, "expires_at": expires_at.isoformat()}
    if to := params.get("to"):
        with staged_file(to, mode=0o600) as file:
            file.write(f"{url}\n".encode())
        return outputs | {"path": to}
    return outputs | {"url": url}
