"""Runs the program of the step with parts of a few MiB, as ``small_parts.py PROGRAM ACTION``.

Files and objects of two or three parts are what most tests are about, and with parts of 64 MiB those take more of the
processor than all that is tested. Only sizes are others here; the parts of an upload are still as large as every store
demands. The tests of the image run the program as it is shipped.
"""

from __future__ import annotations

import runpy
import sys
from types import ModuleType

MIB = 1024**2
SENT_BYTES = 11 * MIB // 2
"""Of a part of an upload at most. It is at least 5 MiB, which is what S3 wants of all but the last."""
FETCHED_BYTES = 2 * MIB
"""Of a range of a download at most."""


def _change(module: ModuleType, **sizes: int) -> None:
    for name, size in sizes.items():
        if not hasattr(module, name):
            raise AttributeError(f"{module.__name__} has no {name} any more: no test would have files of several parts")
        setattr(module, name, size)


def _main(program: str, action: str) -> None:
    sys.argv[:] = [program, action]
    sys.path[0] = program
    from s3_transfer import terms

    # Before anybody takes a copy of them.
    _change(terms, PART_BYTES=SENT_BYTES, _MARKS=MIB // 2)
    from s3_transfer import fetching

    _change(fetching, PART_BYTES=FETCHED_BYTES, _NOTE_BYTES=FETCHED_BYTES // 2)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    _main(*sys.argv[1:])
