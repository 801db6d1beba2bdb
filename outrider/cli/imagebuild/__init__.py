"""Builds Outrider's container images: the base, the pause image, and one for every step plugin.

Standard library only, and nothing of Outrider beyond this package: deploy/images/build.py uses it in a checkout before
anything is installed; ``outrider images`` where Outrider is.
"""

from outrider.cli.imagebuild.images import BASE, PAUSE, Row, StepImage, Workshop
from outrider.cli.imagebuild.plugins import build_plugin, of_checkout, of_machine
from outrider.cli.imagebuild.shell import BuildError, UnknownImage

__all__ = [
    "BASE",
    "PAUSE",
    "BuildError",
    "Row",
    "StepImage",
    "UnknownImage",
    "Workshop",
    "build_plugin",
    "of_checkout",
    "of_machine",
]
