#!/usr/bin/env python3
"""Builds Outrider's container images.

    build.py [build] [NAME…]   what is not up to date; all images without a NAME (base, pause, and each plugin's)
    build.py list              the images and their states
    build.py lock [NAME…]      requirements.in to requirements.lock, with the hashes of all files

An image is up to date when it bears the digest of everything that it is made of, so a build with nothing to do takes
a fraction of a second. Progress goes to stderr, the table of images to stdout. Exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from outrider.cli.imagebuild import BuildError, Row, of_checkout  # noqa: E402

COMMANDS = ("build", "list", "lock")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if not given or (given[0] not in COMMANDS and given[0] not in ("-h", "--help")):
        given = ["build", *given]
    options = _parser().parse_args(given)
    try:
        workshop = of_checkout(ROOT, options.plugin)
        if options.command == "lock":
            for path in workshop.lock(options.names, upgrade=options.upgrade):
                print(path)
            return 0
        if options.command == "build":
            mirror, refresh = options.debian_mirror, options.refresh
            rows = workshop.build(options.names, base_choice=options.base, mirror=mirror, refresh=refresh)
        else:
            rows = workshop.rows()
        _print(rows, options.output)
    except BuildError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("images: interrupted; what is finished stays", file=sys.stderr)
        return 1
    return 0


def _print(rows: list[Row], output: str) -> None:
    if output == "json":
        print(json.dumps([asdict(row) for row in rows]))
        return
    width = max(len(row.tag) for row in rows)
    for row in rows:
        size = f"{row.size_bytes / 1e6:8.1f} MB" if row.size_bytes else ""
        print(f"{row.tag:<{width}}  {row.state:<10}  {size}".rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Builds Outrider's container images.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("names", nargs="*", metavar="NAME", help="base, pause, or the folder of a plugin; default: all")
    common.add_argument(
        "--plugin", action="append", type=Path, default=[], metavar="DIR", help="a plugin outside of this checkout, too"
    )
    common.add_argument("-o", "--output", choices=("table", "json"), default="table")
    build = commands.add_parser("build", parents=[common], help="build what is not up to date")
    build.add_argument(
        "--base", choices=("auto", "registry", "debootstrap"), default="auto", help="where the base is from"
    )
    build.add_argument("--debian-mirror", default="", metavar="URL", help="a mirror for debootstrap other than its own")
    build.add_argument("--refresh", action="store_true", help="build again even what is up to date (newer packages)")
    commands.add_parser("list", parents=[common], help="the images and their states")
    lock = commands.add_parser("lock", parents=[common], help="make requirements.lock from requirements.in")
    lock.add_argument("--upgrade", action="store_true", help="move to the newest versions")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
