"""The packet filter of a network class, as an nftables table of its own for each of the engine's networks.

What a step's program checks for itself binds nobody else's image. So packets from a guarded bridge are judged once
more by the kernel: nothing goes to the machine itself, to loopback, link-local (where clouds keep their metadata) or
private addresses, except what the class allows and the questions to the machine's name servers. A table of our own
needs no order among the engine's rules: a refusal in any chain is final, and the engine never flushes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from agent_core.runtimes.base import NetworkGuard
from outrider.errors import PolicyViolation

REFUSED = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
    "::/96", "64:ff9b:1::/48", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
)  # fmt: skip
"""What a guarded network does not reach by default: the special-purpose ranges of IANA (RFC 6890) that are nobody's
on the internet, and 168.63.129.16, where Azure's platform hands its machines their configuration and certificates:
an address of the internet by its looks, and the machine's own host everywhere in Azure."""

_TRANSLATED = (("64:ff9b::", 96), ("2002::", 16), ("::ffff:0:0", 96))
"""Where an IPv4 address stands inside an IPv6 one: NAT64, 6to4, mapped; and at which bit."""

RESOLV_CONF = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
_NFT_PATH = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin"
_NFT_TIMEOUT_S = 20.0
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_HINT = "or say `guard: false` for this class in the policy file, if something else guards the network"


async def guard_bridge(network_id: str, bridge: str, guard: NetworkGuard) -> None:
    """Have packets that come out of ``bridge`` filtered. Idempotent, and without an instant in which nothing is.

    Raises PolicyViolation where this machine can't.
    """
    nft = shutil.which("nft", path=_NFT_PATH)
    if nft is None:
        raise _unable("nft is not installed", f"install nftables, {_HINT}")
    if not _INTERFACE.fullmatch(bridge):
        raise _unable(f"{bridge!r} is no interface of this machine", _HINT)
    script = rules(network_id, bridge, guard, resolvers=resolvers())
    # In a thread: the event loop's own way to start a process lost its pipes, and died in the child, where nft ends
    # at once or the service is restricted.
    try:
        done = await asyncio.to_thread(_nft, nft, script)
    except subprocess.TimeoutExpired:
        raise _unable(f"nft did not answer within {_NFT_TIMEOUT_S:.0f} s", _HINT) from None
    except OSError as error:
        raise _unable(f"nft can't be started: {error.strerror}", _HINT) from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _unable(
            f"nft failed: {said[0] if said else f'exit code {done.returncode}'}",
            f"the agent needs CAP_NET_ADMIN and a kernel with nf_tables; {_HINT}",
        )


def _nft(nft: str, script: str) -> subprocess.CompletedProcess[bytes]:
    command = [nft, "-f", "-"]
    return subprocess.run(command, input=script.encode(), capture_output=True, timeout=_NFT_TIMEOUT_S, check=False)


def _unable(reason: str, hint: str) -> PolicyViolation:
    return PolicyViolation(
        f"this machine can't filter what containers reach: {reason}", code="network_unguarded", hint=hint
    )


def table_of(network_id: str) -> str:
    """The name of a network's table, in the family ``inet``."""
    return f"outrider-{network_id[:12]}"


def rules(network_id: str, bridge: str, guard: NetworkGuard, *, resolvers: Iterable[str]) -> str:
    """The script for nft: one transaction that replaces the network's table.

    Chains run before those of priority "filter". Answers pass (``ct state``): who is let in by a published port is
    answered wherever it is. What goes to the machine itself is refused whatever its address, as it is its own network.
    """
    allowed, refused = _by_version(guard.allow), _by_version((*REFUSED, *_embedded(REFUSED)))
    name_servers = _by_version((*resolvers, *guard.resolvers))
    passing = ["ct state established,related accept", "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"]
    for version, family in ((4, "ip"), (6, "ip6")):
        if name_servers[version]:
            addresses = ", ".join(name_servers[version])
            passing.append(f"meta l4proto {{ tcp, udp }} th dport 53 {family} daddr {{ {addresses} }} accept")
        if allowed[version]:
            passing.append(f"{family} daddr {{ {', '.join(allowed[version])} }} accept")
    refusing = [
        f"{family} daddr {{ {', '.join(refused[version])} }} reject with icmpx type admin-prohibited"
        for version, family in ((4, "ip"), (6, "ip6"))
    ]
    table = table_of(network_id)
    lines = [f"table inet {table} {{}}", f"delete table inet {table}", f"table inet {table} {{"]
    for chain, end in (("forward", refusing), ("input", ["reject with icmpx type admin-prohibited"])):
        lines += [f"  chain from_{chain} {{", *(f"    {rule}" for rule in (*passing, *end)), "  }"]
        lines += [
            f"  chain {chain} {{",
            f"    type filter hook {chain} priority -5; policy accept;",
            f'    iifname "{bridge}" jump from_{chain}',
            "  }",
        ]
    return "\n".join([*lines, "}", ""])


def resolvers(files: Iterable[Path] = RESOLV_CONF) -> list[str]:
    """The name servers that the engine gives to containers: those of this machine, without its own loopback ones."""
    found: list[str] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                with contextlib.suppress(ValueError):
                    address = ipaddress.ip_address(words[1].partition("%")[0])
                    if not address.is_loopback and str(address) not in found:
                        found.append(str(address))
    return found


def _embedded(ranges: Iterable[str]) -> list[str]:
    """The IPv6 ranges whose packets may end at an address of the IPv4 ones."""
    found = []
    for each in ranges:
        network = ipaddress.ip_network(each)
        if isinstance(network, ipaddress.IPv4Network):
            for prefix, bit in _TRANSLATED:
                address = int(ipaddress.IPv6Address(prefix)) | int(network.network_address) << (96 - bit)
                found.append(f"{ipaddress.IPv6Address(address)}/{bit + network.prefixlen}")
    return found


def _by_version(ranges: Iterable[str]) -> dict[int, list[str]]:
    """Ranges without overlap, which nft would refuse, by IP version."""
    networks = [ipaddress.ip_network(each, strict=False) for each in ranges]
    four = ipaddress.collapse_addresses(each for each in networks if isinstance(each, ipaddress.IPv4Network))
    six = ipaddress.collapse_addresses(each for each in networks if isinstance(each, ipaddress.IPv6Network))
    return {4: [str(each) for each in four], 6: [str(each) for each in six]}
