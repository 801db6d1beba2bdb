"""The step types ``http.download`` and ``http.upload``.

This module only describes them; the work is done by ``program/`` inside the plugin's image.
"""

from __future__ import annotations

from outrider.steps import Resources, StepContext, StepPlan, StepType, hookimpl
from outrider_step_http._models import (
    DownloadOutputs,
    DownloadParams,
    TransferParams,
    UploadOutputs,
    UploadParams,
)

__all__ = [
    "ENVS",
    "IMAGE",
    "DownloadOutputs",
    "DownloadParams",
    "TransferParams",
    "UploadOutputs",
    "UploadParams",
    "outrider_contract",
    "outrider_step_types",
    "resolve_download",
    "resolve_upload",
]

__version__ = "0.1.0"

outrider_contract = ">=1,<2"
"""The versions of the plugin contract that this works with."""

IMAGE = f"outrider/step-http:{__version__}"
"""The image that carries both programs."""

ENVS = (
    "HTTP_TOKEN",
    "HTTP_USER",
    "HTTP_PASSWORD",
    "HTTP_AUTH_VALUE",
    "HTTP_CA",
    "HTTP_PROXY_USER",
    "HTTP_PROXY_PASSWORD",
)
"""What the programs read from their environment: a bearer token, or a user and a password, or the value of the header
that ``auth_header`` names; an authority's certificate; the proxy's user and password."""

# The programs stay below 150 MB; the rest is room for the page cache, which counts against the limit
# and makes writing slow when there is none.
_RESOURCES = Resources(memory_bytes=256 * 1024**2)


def _plan(action: str, params: TransferParams, **more: str) -> StepPlan:
    return StepPlan(
        image=IMAGE,
        args=(action,),
        network="egress",
        resources=_RESOURCES,
        inputs=params.model_dump(mode="json", by_alias=True, exclude_none=True) | more,
    )


def resolve_download(params: DownloadParams, context: StepContext) -> StepPlan:
    """The plan of ``http.download``."""
    return _plan("download", params)


def resolve_upload(params: UploadParams, context: StepContext) -> StepPlan:
    """The plan of ``http.upload``."""
    return _plan("upload", params, method=params.method or ("POST" if params.form else "PUT"))


@hookimpl
def outrider_step_types() -> list[StepType]:
    """A download may be repeated; an upload may be a POST, so a pipeline has to say that it may."""
    return [
        StepType(
            name="http.download",
            description="Fetch a file over HTTP",
            params=DownloadParams,
            outputs=DownloadOutputs,
            resolve=resolve_download,
            envs=ENVS,
            idempotent=True,
        ),
        StepType(
            name="http.upload",
            description="Send a file over HTTP with PUT, POST or a form",
            params=UploadParams,
            outputs=UploadOutputs,
            resolve=resolve_upload,
            envs=ENVS,
            idempotent=False,
        ),
    ]
