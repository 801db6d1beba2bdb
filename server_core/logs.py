"""How unforeseen errors stand in the server's own log."""

from __future__ import annotations

import traceback


def trace(error: BaseException) -> str:
    """The traceback as text. Never with local variables, as pretty renderers show them: those hold secrets."""
    return "".join(traceback.format_exception(error))
