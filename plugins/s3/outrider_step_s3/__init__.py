"""The step types ``s3.download`` and ``s3.upload``, for an object or everything under a prefix, and ``s3.presign``.

This module only describes them; the work is done by ``program/`` inside the plugin's image.
"""

from __future__ import annotations

from outrider.steps import Resources, StepContext, StepPlan, StepType, hookimpl
from outrider_step_s3._models import (
    DownloadOutputs,
    DownloadParams,
    PresignOutputs,
    PresignParams,
    StoreParams,
    TransferParams,
    UploadOutputs,
    UploadParams,
)

__all__ = [
    "ENVS",
    "IMAGE",
    "DownloadOutputs",
    "DownloadParams",
    "PresignOutputs",
    "PresignParams",
    "TransferParams",
    "UploadOutputs",
    "UploadParams",
    "outrider_contract",
    "outrider_step_types",
    "resolve_download",
    "resolve_presign",
    "resolve_upload",
]

__version__ = "0.1.0"

outrider_contract = ">=1,<2"
"""The versions of the plugin contract that this works with."""

IMAGE = f"outrider/step-s3:{__version__}"
"""The image that carries the program."""

_WHERE_AND_WHO = ("S3_ENDPOINT", "S3_REGION", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "S3_SESSION_TOKEN")
_IN_URLS = ("S3_ENDPOINT", "S3_REGION", "S3_ACCESS_KEY_ID")
"""What a presigned URL tells its holder. None of it opens anything without the secret key."""
ENVS = (*_WHERE_AND_WHO, "S3_CA", "S3_SSE_CUSTOMER_KEY")
"""What the program reads from its environment. Without a key pair requests are anonymous."""

# The programs stay below 150 MB; the rest is room for the page cache, which counts against the limit
# and makes writing slow when there is none.
_RESOURCES = Resources(memory_bytes=256 * 1024**2)


def _plan(action: str, params: StoreParams, network: str = "egress") -> StepPlan:
    return StepPlan(
        image=IMAGE,
        args=(action,),
        network=network,
        resources=_RESOURCES,
        inputs=params.model_dump(mode="json", by_alias=True, exclude_none=True),
    )


def resolve_download(params: DownloadParams, context: StepContext) -> StepPlan:
    """The plan of ``s3.download``."""
    return _plan("download", params)


def resolve_upload(params: UploadParams, context: StepContext) -> StepPlan:
    """The plan of ``s3.upload``."""
    return _plan("upload", params)


def resolve_presign(params: PresignParams, context: StepContext) -> StepPlan:
    """The plan of ``s3.presign``. Signing needs a key and a clock, and no network."""
    return _plan("presign", params, network="none")


@hookimpl
def outrider_step_types() -> list[StepType]:
    """All are idempotent: done twice, the same bytes are at the same place."""
    return [
        StepType(
            name="s3.download",
            description="Fetch an object, or everything under a prefix, from an S3-compatible store",
            params=DownloadParams,
            outputs=DownloadOutputs,
            resolve=resolve_download,
            envs=ENVS,
            idempotent=True,
        ),
        StepType(
            name="s3.upload",
            description="Send a file, or a directory as a prefix, to an S3-compatible store",
            params=UploadParams,
            outputs=UploadOutputs,
            resolve=resolve_upload,
            envs=ENVS,
            idempotent=True,
        ),
        StepType(
            name="s3.presign",
            description="Make a URL that lets its holder fetch or write one object for a while",
            params=PresignParams,
            outputs=PresignOutputs,
            resolve=resolve_presign,
            envs=_WHERE_AND_WHO,
            public_envs=_IN_URLS,
            idempotent=True,
        ),
    ]
