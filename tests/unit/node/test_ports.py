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


async def test_a_port_is_tried_where_it_is_to_listen(journal: Journal) -> None:
    leases = Ports(journal, (28890, 28891), address="127.0.0.1", interfaces={"inside": "127.0.0.2"})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.2", 28890))
        assert await leases.lease("a", [PortWish("game", "udp", interface="inside")]) == {"game": 28891}
        with pytest.raises(Conflict, match="by another program"):
            await leases.lease("b", [PortWish("game", "udp", 28890, interface="inside")])
        assert await leases.lease("b", [PortWish("game", "udp")]) == {"game": 28890}


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


async def test_one_number_for_both_protocols_within_a_part_of_the_range(journal: Journal) -> None:
    leases = Ports(journal, (28850, 28869))
    both = PortWish("game", "tcp+udp", None, (28860, 28862))
    assert (await leases.lease("a", [both]))["game"] in (28860, 28861, 28862)
    assert await leases.lease("a", [both]) == leases.held("a")
    rows = await journal.query("SELECT protocol FROM port_leases ORDER BY protocol")
    assert [row["protocol"] for row in rows] == ["tcp", "udp"]
    await leases.lease("b", [both])
    await leases.lease("c", [both])
    with pytest.raises(TemporaryError, match="no port is free in the range asked for, 28860-28862"):
        await leases.lease("d", [both])
    with pytest.raises(InvalidInput, match="outside this node's range"):
        await leases.lease("d", [PortWish("game", within=(100, 200))])


async def test_a_port_is_leased_until_the_kernel_has_let_go_of_it(journal: Journal) -> None:
    leases = Ports(journal, (28870, 28871))
    assert await leases.lease("a", [PortWish("game", "udp", 28870)]) == {"game": 28870}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lingering:
        lingering.bind(("0.0.0.0", 28870))
        await leases.release("a")
        assert leases.held("a") == {}
        assert leases.releasing() == [(28870, "udp", "a")]
        with pytest.raises(TemporaryError, match="was the container a's, and the kernel still holds it"):
            await leases.lease("b", [PortWish("game", "udp", 28870)])
        assert await leases.lease("b", [PortWish("game", "udp")]) == {"game": 28871}
    assert await leases.lease("c", [PortWish("game", "udp", 28870)]) == {"game": 28870}
    assert leases.releasing() == []


async def test_only_what_is_no_longer_wanted_is_given_back(journal: Journal) -> None:
    leases = Ports(journal, (28872, 28879))
    held = await leases.lease("a", [PortWish("game"), PortWish("rcon")])
    await leases.release("a", but=["game"])
    assert leases.held("a") == {"game": held["game"]}
