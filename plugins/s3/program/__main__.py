"""What the image of the S3 steps runs: ``download`` or ``upload``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from outrider_stepkit import Step, main


def _carry_out(
    transfer: Callable[[Mapping[str, Any], Mapping[str, str], Callable[[int, int], None]], dict[str, Any]], step: Step
) -> None:
    step.output(**transfer(step.params, os.environ, step.progress))


def download(step: Step) -> None:
    # Not at the top: boto3 takes half a second to import, and a step that can't start should say so at once.
    from s3_transfer.download import download

    _carry_out(download, step)


def upload(step: Step) -> None:
    from s3_transfer.upload import upload

    _carry_out(upload, step)


if __name__ == "__main__":
    main({"download": download, "upload": upload})
