"""What the image of the S3 steps runs: ``download``, ``upload`` or ``presign``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from outrider_stepkit import Step, main

Transfer = Callable[[Mapping[str, Any], Mapping[str, str], Callable[[int, int | None, str], None]], dict[str, Any]]


def _carry_out(transfer: Transfer, step: Step) -> None:
    def report(done: int, total: int | None, rate: str) -> None:
        step.progress(done, total, message=rate)

    step.secrets.add(os.environ.get("S3_SSE_CUSTOMER_KEY", ""))
    outputs = transfer(step.params, os.environ, report)
    step.output(**{name: value for name, value in outputs.items() if value is not None})


def download(step: Step) -> None:
    # Not at the top: the libraries take a while to import, and a step that can't start should say so at once.
    from s3_transfer.download import download

    _carry_out(download, step)


def upload(step: Step) -> None:
    from s3_transfer.upload import upload

    _carry_out(upload, step)


def presign(step: Step) -> None:
    from s3_transfer.presign import presign

    step.output(**presign(step.params, os.environ))


if __name__ == "__main__":
    main({"download": download, "upload": upload, "presign": presign})
