"""The base image: python:3.12-slim where a registry can be reached, else Debian 12 made by debootstrap."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from outrider.cli.imagebuild import engine
from outrider.cli.imagebuild.shell import BuildError, Progress, as_root, run

REGISTRY_IMAGE = "python:3.12-slim"
SUITE = "bookworm"
BOOTSTRAPPED = f"outrider/debian:{SUITE}"
PACKAGES = "python3,ca-certificates"
# Nothing here is read by a program that runs in a step. The directories themselves stay.
LEFT_OUT = (
    "./dev/*",
    "./proc/*",
    "./sys/*",
    "./run/*",
    "./tmp/*",
    "./var/cache/*",
    "./var/lib/apt/lists/*",
    "./var/log/*",
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/info/*",
    "./usr/share/locale/*",
    "./usr/share/lintian/*",
)
RECIPE = "\n".join(("1", REGISTRY_IMAGE, SUITE, PACKAGES, *LEFT_OUT))
"""What the base's digest covers beside its Dockerfile."""


def source(choice: str, mirror: str, progress: Progress) -> str:
    """The image that the base is built from. ``choice``: "auto", "registry" or "debootstrap"."""
    if choice in ("auto", "registry"):
        progress.note(f"looking for {REGISTRY_IMAGE}")
        if engine.pull(REGISTRY_IMAGE, progress.note):
            return REGISTRY_IMAGE
        if choice == "registry":
            raise BuildError(f"{REGISTRY_IMAGE} could not be pulled from a registry: try --base debootstrap")
    bootstrap(BOOTSTRAPPED, SUITE, PACKAGES, progress, mirror=mirror)
    return BOOTSTRAPPED


def bootstrap(
    tag: str, suite: str, packages: str, progress: Progress, *, mirror: str = "", components: str = "main"
) -> None:
    """Make the image ``tag`` of a small system of this ``suite`` with these packages, separated by commas."""
    if shutil.which("debootstrap") is None and not Path("/usr/sbin/debootstrap").exists():
        progress.note("installing debootstrap")
        _install_debootstrap(progress)
    # Not beneath /tmp: it is often mounted without device files, which a root file system has.
    work = Path(tempfile.mkdtemp(prefix="outrider-base-", dir="/var/tmp"))
    tree = work / "root"
    try:
        run(
            as_root(
                [
                    "/usr/sbin/debootstrap",
                    "--variant=minbase",
                    f"--components={components}",
                    f"--include={packages}",
                    suite,
                    str(tree),
                    *([mirror] if mirror else []),
                ]
            ),
            what=f"making a root file system of {suite} with debootstrap",
            on_line=lambda line: progress.note(line.removeprefix("I: ")),
        )
        progress.note("handing the root file system to the engine")
        engine.import_tree(tree, tag, LEFT_OUT, as_root([]))
    finally:
        # debootstrap may have been ended between mounting and unmounting; a tree with mounts in it must not be removed.
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        inside = [mount for mount in mounts if mount.startswith(f"{tree}/")]
        for mount in sorted(inside, reverse=True):
            run(as_root(["umount", mount]), what=f"unmounting {mount}")
        run(as_root(["rm", "-rf", "--one-file-system", str(work)]), what=f"removing {work}")


def _install_debootstrap(progress: Progress) -> None:
    if shutil.which("apt-get") is None:
        raise BuildError(
            "no registry can be reached for the base image, and debootstrap is not installed: install debootstrap"
        )
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run(as_root(["apt-get", "update", "-q"]), what="apt-get update", on_line=progress.note, env=quiet)
    # The keyring verifies Debian's packages where this machine is an Ubuntu.
    packages = ["debootstrap", "debian-archive-keyring"]
    install = ["apt-get", "install", "-yq", "--no-install-recommends", *packages]
    run(as_root(install), what="installing debootstrap", on_line=progress.note, env=quiet)
