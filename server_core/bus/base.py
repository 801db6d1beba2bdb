"""What the server asks of a bus.

A message says only that a topic has changed; who watches it reads the store again. So messages may be merged,
repeated or (with a poll behind them) lost, and nobody needs the bus to be right, only to be prompt.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

EVENTS = "events"
NODES = "nodes"


def run_topic(run_id: str) -> str:
    """Changes of a run."""
    return f"run.{run_id}"


def log_topic(run_id: str) -> str:
    """News in a run's log."""
    return f"log.{run_id}"


class Subscription(Protocol):
    async def wait(self, timeout_s: float | None = None) -> bool:
        """Return True once a topic has changed since the last call, False after ``timeout_s``.

        Raises Unavailable when the bus is closed: the server is stopping.
        """


class Bus(Protocol):
    def publish(self, topic: str) -> None:
        """Wake everybody who watches ``topic``; never blocks."""

    def subscribe(self, *topics: str) -> AbstractContextManager[Subscription]:
        """Watch topics from now on; subscribe first and read the store then, or a change is missed."""

    def close(self) -> None:
        """Wake everybody for the last time."""
