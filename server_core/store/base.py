"""What the server asks of a database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from sqlalchemy import Connection

from server_core.store.commits import Commit

T = TypeVar("T")


class Database(Protocol):
    """Transactions as functions of a connection. They run off the event loop and may be run again: no side effects."""

    async def write(self, commit: Commit, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction of its own; returns once it is durable. What it raises rolls it back.

        ``commit`` says which of the server's commits it is.
        """

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` against the last committed state; it must not write."""

    def close(self) -> None:
        """Finish what was handed in, then close. Idempotent."""
