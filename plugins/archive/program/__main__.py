"""What the image runs: ``extract`` or ``create``, by the plan's first argument."""

from __future__ import annotations

from outrider_stepkit import Step, main

# Each imports its own only: together they take half as long again as either.


def extract(step: Step) -> None:
    from archiving.extract import extract

    extract(step)


def create(step: Step) -> None:
    from archiving.create import create

    create(step)


main({"extract": extract, "create": create})
