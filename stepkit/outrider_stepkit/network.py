"""Which addresses a step may connect to: the internet, and what the node's network class allows beside it.

The node's packet filter says the same to every program. One that asks here first refuses with a sentence, and also
where the node has no filter. What counts is the address that is connected to, after the name was resolved: a name that
is harmless when it is looked at may lead somewhere else a moment later.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping

from outrider_stepkit.step import StepFailure

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

REFUSED = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
    "::/96", "64:ff9b:1::/48", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
)  # fmt: skip
"""Loopback, link-local (where clouds keep their metadata), private and other special ranges, and 168.63.129.16, where
Azure's machines get their configuration from; the node's filter has the same."""

_REFUSED = tuple(ipaddress.ip_network(each) for each in REFUSED)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefused(StepFailure):
    """The address is of the node's own network, and the step's network class does not allow it."""


class AddressGuard:
    """Judges addresses, and makes connections only to those that may be connected to."""

    def __init__(self, allow: Iterable[str] = (), *, network: str = "") -> None:
        """``allow``: ranges beside the internet. ``network``: the network class, for sentences."""
        self._allow = tuple(ipaddress.ip_network(each, strict=False) for each in allow)
        self._network = network

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> AddressGuard:
        """The guard of this step, as the agent tells it (OUTRIDER_NETWORK, OUTRIDER_NETWORK_ALLOW)."""
        environ = os.environ if environ is None else environ
        allow = [each for each in environ.get("OUTRIDER_NETWORK_ALLOW", "").split(",") if each]
        return cls(allow, network=environ.get("OUTRIDER_NETWORK", ""))

    def allows(self, address: str) -> bool:
        """Whether an IP address (a scope like ``%eth0`` may follow) may be connected to."""
        try:
            judged = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        return all(self._allows(each) for each in (judged, *_inner(judged)))

    def _allows(self, address: Address) -> bool:
        if any(address in network for network in self._allow):
            return True
        return not any(address in network for network in _REFUSED)

    def check_literal(self, host: str) -> None:
        """For connections that somebody else makes: raises AddressRefused if ``host`` is written as an address that
        may not be connected to, in any of the forms that resolvers understand, or as this machine's own name."""
        address = host.strip("[]")
        if ":" not in address:
            try:
                address = socket.inet_ntoa(socket.inet_aton(address))
            except OSError:
                address = "127.0.0.1" if address.rstrip(".").rpartition(".")[2] == "localhost" else ""
        if address and not self.allows(address):
            raise self.refusal(host, [address])

    def connect(self, host: str, port: int, timeout_s: float | None = None) -> socket.socket:
        """A TCP connection to the first address of ``host`` that may be connected to and answers.

        Raises AddressRefused if there is none that may, and OSError (``socket.gaierror`` for the name) otherwise.
        """
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        usable = [each for each in found if self.allows(str(each[4][0]))]
        if not usable:
            raise self.refusal(host, sorted({str(each[4][0]) for each in found}))
        failure: OSError | None = None
        for family, kind, protocol, _, address in usable:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(timeout_s)
                connection.connect(address)
            except OSError as error:
                connection.close()
                failure = error
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        raise failure or OSError(f"{host} has no address")

    def refusal(self, host: str, addresses: Iterable[str]) -> AddressRefused:
        """What is said of a host that may not be connected to."""
        which = ", ".join(addresses)
        means = "" if which == host.strip("[]") else f" ({which})"
        network = f" {self._network!r}" if self._network else ""
        return AddressRefused(
            f"{host}{means} belongs to the node's own network, and this node's network class{network} does not allow "
            "it: give an address of the internet, or have the node's policy allow that range",
            code="address_refused",
        )


def _inner(address: Address) -> list[Address]:
    """The IPv4 addresses that packets to an IPv6 address may end at: mapped, NAT64, 6to4, Teredo."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    inner: list[Address] = []
    if address.ipv4_mapped:
        inner.append(address.ipv4_mapped)
    if address in _NAT64:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address.sixtofour:
        inner.append(address.sixtofour)
    if address.teredo:
        inner += address.teredo
    return inner
