"""Which addresses a step may connect to, in every form in which they can be written."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_stepkit.network import REFUSED, AddressGuard, AddressRefused

NEAR = st.one_of([st.ip_addresses(network=each) for each in REFUSED])
ANY_V4 = st.ip_addresses(v=4)


def forms(address: ipaddress.IPv4Address) -> list[str]:
    """An IPv4 address, and the IPv6 addresses whose packets may end there."""
    value = int(address)
    return [
        str(address),
        f"::ffff:{address}",
        str(ipaddress.IPv6Address((0x64FF9B << 96) | value)),  # NAT64, RFC 6052
        str(ipaddress.IPv6Address((0x2002 << 112) | value << 80 | 1)),  # 6to4, RFC 3056
    ]


@given(NEAR)
def test_nothing_near_is_allowed_in_whatever_form(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    guard = AddressGuard()
    for form in forms(address) if isinstance(address, ipaddress.IPv4Address) else [str(address), f"{address}%eth0"]:
        assert not guard.allows(form), form


@given(ANY_V4)
def test_all_forms_of_an_address_are_judged_alike(address: ipaddress.IPv4Address) -> None:
    guard = AddressGuard()
    assert len({guard.allows(form) for form in forms(address)}) == 1
    assert all(AddressGuard([f"{address}/32"]).allows(form) for form in forms(address))


@given(NEAR, st.integers(min_value=1, max_value=8))
def test_what_is_allowed_opens_nothing_beside_it(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, offset: int
) -> None:
    guard = AddressGuard([str(address)])
    assert guard.allows(str(address))
    beside = type(address)((int(address) + offset) % (1 << address.max_prefixlen))
    assert guard.allows(str(beside)) == AddressGuard().allows(str(beside))


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"]
)
def test_where_clouds_keep_their_metadata_nothing_goes(address: str) -> None:
    assert not AddressGuard().allows(address)


def test_the_internet_is_allowed() -> None:
    for address in ("1.1.1.1", "203.0.113.9", "2606:4700:4700::1111", "64:ff9b::101:101"):
        assert AddressGuard().allows(address), address
    assert not AddressGuard().allows("no address")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "0", "::1", "[::1]"])
def test_this_machine_is_refused_whatever_it_is_called(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        with pytest.raises(AddressRefused, match=r"own network.*'egress'"):
            AddressGuard(network="egress").connect(host.strip("[]"), server.getsockname()[1], 5)
        with pytest.raises(TimeoutError):
            server.accept()
        with pytest.raises(AddressRefused):
            AddressGuard().check_literal(host)


def test_the_address_that_is_connected_to_is_the_one_that_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads elsewhere when it is asked for again (DNS rebinding)."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]

        def resolve(host: str, port: int, **_: object) -> list[object]:
            asked.append(host)
            address = "127.0.0.2" if len(asked) == 1 else "127.0.0.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with pytest.raises(ConnectionRefusedError):  # nothing listens at the address that was judged
            AddressGuard(["127.0.0.2"]).connect("rebind.example", port, 5)
        with pytest.raises(TimeoutError):
            server.accept()
    assert asked == ["rebind.example"]


def test_an_allowed_address_is_chosen_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ("10.0.0.1", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with AddressGuard(["127.0.0.0/8"]).connect("both.example", port, 5) as made:
            assert made.getpeername() == ("127.0.0.1", port)


def test_the_guard_is_what_the_agent_says() -> None:
    told = {"OUTRIDER_NETWORK": "lan", "OUTRIDER_NETWORK_ALLOW": "10.0.0.0/8,fd00::/8"}
    guard = AddressGuard.from_environ(told)
    assert guard.allows("10.1.2.3")
    assert guard.allows("fd00::1")
    assert not guard.allows("192.168.0.1")
    assert not AddressGuard.from_environ({}).allows("10.1.2.3")
