"""Host ports: leased from the node's range before a container exists, kept until it is removed."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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

# A game's two protocols may share a number, and what is given back stays taken until the kernel has let go of it.
RELEASING = """
CREATE TABLE port_leases_2 (
    port INTEGER NOT NULL,
    protocol TEXT NOT NULL,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (port, protocol),
    UNIQUE (owner, name, protocol)
);
INSERT INTO port_leases_2 SELECT port, protocol, owner, name FROM port_leases;
DROP TABLE port_leases;
ALTER TABLE port_leases_2 RENAME TO port_leases;
CREATE TABLE ports_releasing (
    port INTEGER NOT NULL,
    protocol TEXT NOT NULL,
    owner TEXT NOT NULL,
    PRIMARY KEY (port, protocol)
)
"""

Protocol = Literal["tcp", "udp"]
Protocols = Literal["tcp", "udp", "tcp+udp"]
_PROTOCOLS: tuple[Protocol, ...] = ("tcp", "udp")
DEFAULT_RANGE = (27000, 27999)


@dataclass(frozen=True, slots=True)
class PortWish:
    """A port that a container needs. ``host``: exactly this one; ``None``: any free one, of the node's range or, with
    ``within``, of a part of it. ``protocol``: "tcp+udp" is one number for both. ``interface``: the name of one of
    the policy."""

    name: str
    protocol: Protocols = "tcp"
    host: int | None = None
    within: tuple[int, int] | None = None
    interface: str | None = None

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """Those that it is leased for."""
        return tuple(each for each in _PROTOCOLS if each in self.protocol.split("+"))

    def fits(self, port: int) -> bool:
        """Whether ``port`` is what it asks for."""
        return self.host in (None, port) and (self.within is None or self.within[0] <= port <= self.within[1])


def bindable(port: int, protocols: Iterable[Protocol] = ("tcp", "udp"), address: str = "0.0.0.0") -> bool:
    """Whether the kernel would let somebody listen on ``port`` now, for every one of ``protocols``."""
    for protocol in protocols:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, kind) as probe:
            if protocol == "tcp":
                # What only lingers in TIME_WAIT does not keep the engine from listening.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


class Ports:
    """Leases of host ports, durable in the journal. ``port_range`` is inclusive at both ends.

    A number is one container's at a time, whatever interfaces there are: ``address`` by default, and ``interfaces``,
    addresses by name.
    """

    def __init__(
        self,
        journal: Journal,
        port_range: tuple[int, int] = DEFAULT_RANGE,
        *,
        address: str = "0.0.0.0",
        interfaces: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        first, last = port_range
        if not 1 <= first <= last <= 65535:
            raise InvalidInput(
                f"the port range {first}-{last} is not valid", hint="two ports from 1 to 65535, the lower one first"
            )
        self._journal = journal
        self._first, self._last = first, last
        self._address = address
        self._interfaces = interfaces
        self._lock = asyncio.Lock()  # between the test of a port and its lease
        self._next = first

    async def lease(self, owner: str, wishes: Sequence[PortWish]) -> dict[str, int]:
        """Host ports for all of ``wishes``, by name, or none of them; ``owner`` is the container's name.

        What ``owner`` holds already under that name is kept. Raises Conflict if a port asked for by number
        is taken, TemporaryError if it is just being given back, or if there is no free one left.
        """
        async with self._lock:
            await self._reap()
            held = self._by_name(owner)
            ports: dict[str, int] = {}
            new: list[tuple[PortWish, int]] = []
            for wish in wishes:
                found = held.get(wish.name)
                if found is not None and found[1] == set(wish.protocols) and wish.fits(found[0]):
                    ports[wish.name] = found[0]
                    continue
                chosen = {(port, protocol) for other, port in new for protocol in other.protocols}
                port = await asyncio.to_thread(self._choose, owner, wish, chosen)
                ports[wish.name] = port
                new.append((wish, port))
            if new:
                await self._journal.write(Transition.PORTS_LEASED, lambda db: self._record(db, owner, new))
            return ports

    async def release(self, owner: str, *, but: Collection[str] = ()) -> None:
        """Give back what ``owner`` holds, all ``but`` these names. Nobody else gets a port before the kernel has let go
        of it. Idempotent."""

        def give_back(db: sqlite3.Connection) -> None:
            for row in db.execute("SELECT port, protocol, name FROM port_leases WHERE owner = ?", (owner,)).fetchall():
                if row["name"] not in but:
                    release_lease(db, row["port"], row["protocol"], owner)

        await self._journal.write(Transition.PORTS_RELEASED, give_back)

    def held(self, owner: str) -> dict[str, int]:
        """The ports that ``owner`` holds, by name."""
        return {name: port for name, (port, _) in self._by_name(owner).items()}

    def releasing(self) -> list[tuple[int, Protocol, str]]:
        """What is given back and not free yet: port, protocol, and who had it."""
        rows = self._journal.query_now("SELECT * FROM ports_releasing ORDER BY port")
        return [(int(row["port"]), row["protocol"], str(row["owner"])) for row in rows]

    async def reap(self) -> None:
        """Let go of the ports that the kernel has let go of."""
        async with self._lock:
            await self._reap()

    async def _reap(self) -> None:
        waiting = self.releasing()
        if not waiting:
            return
        free = await asyncio.to_thread(
            lambda: [(port, kind) for port, kind, _ in waiting if bindable(port, (kind,), self._address)]
        )
        if free:
            await self._journal.write(
                Transition.PORTS_FREED,
                lambda db: db.executemany("DELETE FROM ports_releasing WHERE port = ? AND protocol = ?", free).rowcount,
            )

    def _by_name(self, owner: str) -> dict[str, tuple[int, set[str]]]:
        found: dict[str, tuple[int, set[str]]] = {}
        rows = self._journal.query_now("SELECT * FROM port_leases WHERE owner = ? ORDER BY port", (owner,))
        for row in rows:
            found.setdefault(row["name"], (int(row["port"]), set()))[1].add(row["protocol"])
        return found

    def _address_of(self, wish: PortWish) -> str:
        return self._address if wish.interface is None else self._interfaces[wish.interface]

    def _choose(self, owner: str, wish: PortWish, chosen: set[tuple[int, Protocol]]) -> int:
        rows = self._journal.query_now("SELECT port, protocol, owner FROM port_leases")
        if wish.host is not None:
            self._check_asked(owner, wish, wish.host, rows, chosen)
            return wish.host
        first, last = self._within(wish)
        taken = {int(row["port"]) for row in rows} | {port for port, _, _ in self.releasing()}
        taken |= {port for port, _ in chosen}
        size = last - first + 1
        # Round robin, so that a port just given back rests before somebody else gets it.
        begin = self._next if first <= self._next <= last else first
        for step in range(size):
            port = first + (begin - first + step) % size
            if port not in taken and bindable(port, address=self._address_of(wish)):
                self._next = port + 1 if port < self._last else self._first
                return port
        where = "this node's range" if wish.within is None else "the range asked for,"
        raise TemporaryError(
            f"no port is free in {where} {first}-{last}",
            code="ports_exhausted",
            hint="widen `ports.range` in the node's policy, or remove containers that are no longer needed"
            if wish.within is None
            else "widen it, or remove containers that are no longer needed",
        )

    def _within(self, wish: PortWish) -> tuple[int, int]:
        if wish.within is None:
            return self._first, self._last
        first, last = max(wish.within[0], self._first), min(wish.within[1], self._last)
        if first > last:
            raise InvalidInput(
                f"the range {wish.within[0]}-{wish.within[1]} of port {wish.name} is outside this node's range "
                f"{self._first}-{self._last}",
                code="port_out_of_range",
                hint="leave `range` out to get any free one",
            )
        return first, last

    def _check_asked(
        self,
        owner: str,
        wish: PortWish,
        port: int,
        rows: Sequence[sqlite3.Row],
        chosen: set[tuple[int, Protocol]],
    ) -> None:
        if not self._first <= port <= self._last:
            raise InvalidInput(
                f"port {port} is outside this node's range {self._first}-{self._last}",
                code="port_out_of_range",
                hint="leave `host` out to get a free one",
            )
        for protocol in wish.protocols:
            if (port, protocol) in chosen:
                raise InvalidInput(f"port {port}/{protocol} is asked for twice", code="port_taken")
            for row in rows:
                if row["port"] == port and row["protocol"] == protocol and row["owner"] != owner:
                    raise Conflict(
                        f"port {port}/{protocol} is taken by the container {row['owner']}",
                        code="port_taken",
                        hint="choose another one, or leave `host` out to get a free one",
                    )
            for number, kind, former in self.releasing():
                if (number, kind) == (port, protocol):
                    raise TemporaryError(
                        f"port {port}/{protocol} was the container {former}'s, and the kernel still holds it",
                        code="port_releasing",
                        hint="it is free in a moment",
                    )
            if not bindable(port, (protocol,), self._address_of(wish)):
                raise Conflict(
                    f"port {port}/{protocol} is taken by another program on this node",
                    code="port_taken",
                    hint="stop that program, choose another port, or leave `host` out to get a free one",
                )

    @staticmethod
    def _record(db: sqlite3.Connection, owner: str, leases: Sequence[tuple[PortWish, int]]) -> None:
        for wish, port in leases:
            former = "SELECT port, protocol FROM port_leases WHERE owner = ? AND name = ?"
            for row in db.execute(former, (owner, wish.name)).fetchall():
                release_lease(db, row["port"], row["protocol"], owner)
            for protocol in wish.protocols:
                take_lease(db, port, protocol, owner, wish.name)


def take_lease(db: sqlite3.Connection, port: int, protocol: str, owner: str, name: str) -> None:
    """Within a transaction: ``owner`` has the port from now on."""
    db.execute("DELETE FROM ports_releasing WHERE port = ? AND protocol = ?", (port, protocol))
    db.execute(
        "INSERT OR REPLACE INTO port_leases (port, protocol, owner, name) VALUES (?, ?, ?, ?)",
        (port, protocol, owner, name),
    )


def release_lease(db: sqlite3.Connection, port: int, protocol: str, owner: str) -> None:
    """Within a transaction: ``owner`` gives the port back; it is free once the kernel says so."""
    db.execute("DELETE FROM port_leases WHERE port = ? AND protocol = ?", (port, protocol))
    db.execute(
        "INSERT OR REPLACE INTO ports_releasing (port, protocol, owner) VALUES (?, ?, ?)", (port, protocol, owner)
    )
