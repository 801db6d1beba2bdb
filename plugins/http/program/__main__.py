"""What the image of the HTTP steps runs: ``download`` or ``upload``."""

from __future__ import annotations

import os

from outrider_stepkit import Step, main


def download(step: Step) -> None:
    # Not at the top: a step that can't start should say so before the imports.
    from http_transfer.download import download

    step.output(**download(step.params, os.environ, lambda done, total, rate: step.progress(done, total, message=rate)))


def upload(step: Step) -> None:
    from http_transfer.upload import upload

    step.output(**upload(step.params, os.environ, lambda done, total, rate: step.progress(done, total, message=rate)))


if __name__ == "__main__":
    main({"download": download, "upload": upload})
