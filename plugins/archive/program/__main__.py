"""What the image runs: ``extract`` or ``create``, by the plan's first argument."""

from __future__ import annotations

from archiving.create import create
from archiving.extract import extract
from outrider_stepkit import main

main({"extract": extract, "create": create})
