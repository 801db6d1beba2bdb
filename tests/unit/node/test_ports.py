from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agent_core import ports
from agent_core.journal import Journal
from agent_core.ports import Ports, PortWish
from outrider.errors import Conflict, InvalidInput, TemporaryError


async def test_leases_are_distinct_and_last_until_released(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db", [ports.MIGRATION, ports.RELEASING])
    leases = Ports(journal, (28800, 28819))
    first = await leases.lease("a", [PortWish("game", "udp"), PortWish("http")])
    second = await leases.lease("b", [PortWish("game", "udp")])
    assert len({*first.values(), *second.values()}) == 3
    assert await leases.lease("a", [PortWish("game", "udp"), PortWish("http")]) == first
    journal.close()

    journal = Journal(tmp_path / "j.db", [ports.MIGRATION, ports.RELEASING])  # the agent comes back
    leases = Ports(journal, (28800, 28819))
    assert leases.held("a") == first
    await leases.release("a")
    assert leases.held("a") == {}
    journal.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_port_that_somebody_holds_is_passed_over_whichever_protocol(journal: Journal, kind: int) -> None:
    leases = Ports(journal, (28820, 28821))
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("0.0.0.0", 28820))
        assert await leases.lease("a", [PortWish("game", "udp")]) == {"game": 28821}
        with pytest.raises(TemporaryError, match="no port is free in this node's range 28820-28821"):
            await leases.lease("b", [PortWish("game")])
        assert leases.held("b") == {}


async def test_port_asked_for_by_number(journal: Journal) -> None:
    leases = Ports(journal, (28830, 28839))
    assert await leases.lease("a", [PortWish("game", "udp", 28835)]) == {"game": 28835}
    # A game's two protocols may share a number.
    assert await leases.lease("a", [PortWish("game", "udp", 28835), PortWish("rcon", "tcp", 28835)]) == {
        "game": 28835,
        "rcon": 28835,
    }
    with pytest.raises(Conflict, match="port 28835/udp is taken by the container a"):
        await leases.lease("b", [PortWish("game", "udp", 28835)])
    with pytest.raises(InvalidInput, match="outside this node's range"):
        await leases.lease("b", [PortWish("game", "udp", 80)])


async def test_all_or_nothing(journal: Journal) -> None:
    leases = Ports(journal, (28840, 28841))
    with pytest.raises(TemporaryError):
        await leases.lease("a", [PortWish("one"), PortWish("two"), PortWish("three")])
    assert leases.held("a") == {}
