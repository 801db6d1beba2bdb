"""The agent's own log: structured, to stderr, one form for everything that writes to it, and never a secret in it."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

_SECRET_WORDS = ("token", "secret", "password", "credential", "authorization", "proof")


def configure_logging(level: str = "info", form: Literal["text", "json"] = "text") -> None:
    """Send structlog and the standard library's loggers to stderr, from ``level`` up. Call it once, at the start."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_secrets,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=False,
    )
    last: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if form == "json"
        # Its own choice of a traceback shows local variables where rich is installed, and those hold secrets.
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("alembic", "urllib3", "docker", "stevedore", "asyncio", "grpc"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


class _Handler(logging.StreamHandler[Any]):
    """Writes to a stream that may be a file on a full disk, or a pipe that nobody reads any more."""

    def handleError(self, record: logging.LogRecord) -> None:
        # The line is lost; saying so on the same stream would fail, too, and must never reach who wanted to log.
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def _without_secrets(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A last guard: whatever is logged under such a name is not shown."""
    for key in event:
        if any(word in key.lower() for word in _SECRET_WORDS):
            event[key] = "…"
    return event
