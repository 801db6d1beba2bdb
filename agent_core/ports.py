"""Host ports: leased from the node's range before a container exists, kept until it is removed."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from agent_core.journal import Journal
from agent_core.transitions import Transition
from outrider.errors import Conflict, InvalidInput, TemporaryError

MIGRATION = """
CREATE TABLE port_leases (
    port INTEGER NOT NULL,
    protocol TEXT NOT NULL,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (port, protocol),
    UNIQUE (owner, name)
)
"""

Protocol = Literal["tcp", "udp"]
DEFAULT_RANGE = (27000, 27999)


@dataclass(frozen=True, slots=True)
class PortWish:
    """A port that a container needs. ``host``: exactly this one; ``None``: any free one of the range."""

    name: str
    protocol: Protocol = "tcp"
    host: int | None = None


def bindable(port: int, protocols: Iterable[Protocol] = ("tcp", "udp"), address: str = "0.0.0.0") -> bool:
    """Whether the kernel would let somebody listen on ``port`` now, for every one of ``protocols``."""
    for protocol in protocols:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        with socket.socket(socket.AF_INET, kind) as probe:
            if protocol == "tcp":
                # What only lingers in TIME_WAIT does not keep the engine from listening.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


class Ports:
    """Leases of host ports, durable in the journal. ``port_range`` is inclusive at both ends."""

    def __init__(
        self, journal: Journal, port_range: tuple[int, int] = DEFAULT_RANGE, *, address: str = "0.0.0.0"
    ) -> None:
        first, last = port_range
        if not 1 <= first <= last <= 65535:
            raise InvalidInput(
                f"the port range {first}-{last} is not valid", hint="two ports from 1 to 65535, the lower one first"
            )
        self._journal = journal
        self._first, self._last = first, last
        self._address = address
        self._lock = asyncio.Lock()  # between the test of a port and its lease
        self._next = first

    async def lease(self, owner: str, wishes: Sequence[PortWish]) -> dict[str, int]:
        """Host ports for all of ``wishes``, by name, or none of them; ``owner`` is the container's name.

        What ``owner`` holds already under that name is kept. Raises Conflict if a port asked for by number
        is taken, TemporaryError if the range has no free one left.
        """
        async with self._lock:
            held = {row["name"]: row for row in self._held(owner)}
            ports: dict[str, int] = {}
            new: list[tuple[PortWish, int]] = []
            for wish in wishes:
                row = held.get(wish.name)
                if row and row["protocol"] == wish.protocol and wish.host in (None, row["port"]):
                    ports[wish.name] = int(row["port"])
                    continue
                chosen = {port for _, port in new}
                port = await asyncio.to_thread(self._choose, owner, wish, chosen)
                ports[wish.name] = port
                new.append((wish, port))
            if new:
                await self._journal.write(Transition.PORTS_LEASED, lambda db: self._record(db, owner, new))
            return ports

    async def release(self, owner: str) -> None:
        """Give back what ``owner`` holds. A port still held by the kernel is passed over when leasing. Idempotent."""
        await self._journal.execute(Transition.PORTS_RELEASED, "DELETE FROM port_leases WHERE owner = ?", (owner,))

    def held(self, owner: str) -> dict[str, int]:
        """The ports that ``owner`` holds, by name."""
        return {row["name"]: int(row["port"]) for row in self._held(owner)}

    def _held(self, owner: str) -> list[sqlite3.Row]:
        return self._journal.query_now("SELECT * FROM port_leases WHERE owner = ? ORDER BY port", (owner,))

    def _choose(self, owner: str, wish: PortWish, chosen: set[int]) -> int:
        rows = self._journal.query_now("SELECT port, protocol, owner FROM port_leases")
        if wish.host is not None:
            self._check_asked(owner, wish, wish.host, rows)
            return wish.host
        taken = {int(row["port"]) for row in rows} | chosen
        size = self._last - self._first + 1
        # Round robin, so that a port just given back rests before somebody else gets it.
        for step in range(size):
            port = self._first + (self._next - self._first + step) % size
            if port not in taken and bindable(port, address=self._address):
                self._next = port + 1 if port < self._last else self._first
                return port
        raise TemporaryError(
            f"no port is free in this node's range {self._first}-{self._last}",
            code="ports_exhausted",
            hint="widen `ports.range` in the node's policy, or remove containers that are no longer needed",
        )

    def _check_asked(self, owner: str, wish: PortWish, port: int, rows: Sequence[sqlite3.Row]) -> None:
        if not self._first <= port <= self._last:
            raise InvalidInput(
                f"port {port} is outside this node's range {self._first}-{self._last}",
                code="port_out_of_range",
                hint="leave `host` out to get a free one",
            )
        for row in rows:
            if row["port"] == port and row["protocol"] == wish.protocol and row["owner"] != owner:
                raise Conflict(
                    f"port {port}/{wish.protocol} is taken by the container {row['owner']}",
                    code="port_taken",
                    hint="choose another one, or leave `host` out to get a free one",
                )
        if not bindable(port, (wish.protocol,), self._address):
            raise Conflict(
                f"port {port}/{wish.protocol} is taken by another program on this node",
                code="port_taken",
                hint="stop that program, choose another port, or leave `host` out to get a free one",
            )

    @staticmethod
    def _record(db: sqlite3.Connection, owner: str, leases: Sequence[tuple[PortWish, int]]) -> None:
        for wish, port in leases:
            db.execute("DELETE FROM port_leases WHERE owner = ? AND name = ?", (owner, wish.name))
            db.execute(
                "INSERT INTO port_leases (port, protocol, owner, name) VALUES (?, ?, ?, ?)",
                (port, wish.protocol, owner, wish.name),
            )
