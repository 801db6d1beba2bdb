"""The rules that a network class comes to, and what a node without a filter does."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_stepkit import network
from pydantic import ValidationError

from agent_core.journal import Journal
from agent_core.netpool import NetPool
from agent_core.networks import keep_guarded, told_to_step
from agent_core.policy import PRIVATE_RANGES, NodePolicy
from agent_core.runtimes import _netfilter
from agent_core.runtimes._netfilter import REFUSED, guard_bridge, resolvers, rules
from agent_core.runtimes.base import NetworkGuard
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.errors import PolicyViolation

ranges = st.lists(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str), max_size=6)


def policy_of(**more: object) -> NodePolicy:
    return NodePolicy.model_validate({"warm_none": 0, "networks": {"egress": {"network": "n", "warm": 0, **more}}})


@given(allow=ranges, servers=ranges)
def test_rules_open_exactly_what_is_allowed_and_then_refuse(allow: list[str], servers: list[str]) -> None:
    script = rules("f" * 64, "br-f", NetworkGuard(allow=tuple(allow)), resolvers=servers)
    forward, _, own = script.partition("chain from_input")
    for chain in (forward, own):
        passing, refusing, _ = (
            chain.partition("daddr { 0.0.0.0/8") if chain is forward else chain.partition("    reject")
        )
        assert refusing
        opened = set[str]()
        for line in passing.splitlines():
            if "daddr" in line and "dport" not in line:
                opened |= set(line.partition("{")[2].partition("}")[0].replace(",", " ").split())
        networks = [ipaddress.ip_network(each) for each in opened]
        assert all(any(ipaddress.ip_address(each) in network for network in networks) for each in allow)
        assert sum(network.num_addresses for network in networks) == len(set(allow)), "more is open than was said"


def test_the_steps_own_guard_refuses_the_same_ranges() -> None:
    assert network.REFUSED == REFUSED


def test_azures_platform_is_asked_for_names_and_nothing_else() -> None:
    script = rules("f" * 64, "br-f", NetworkGuard(), resolvers=["168.63.129.16"])
    asked, refused = "th dport 53 ip daddr { 168.63.129.16/32 } accept", "127.0.0.0/8, 168.63.129.16/32, 169.254.0.0/16"
    assert 0 < script.index(asked) < script.index(refused)


def test_every_special_range_is_refused_and_nothing_of_the_internet() -> None:
    refused = [ipaddress.ip_network(each) for each in REFUSED]
    four = "127.0.0.1 169.254.169.254 10.1.2.3 172.31.0.1 192.168.1.1 100.64.0.1 0.0.0.0 255.255.255.255 224.0.0.1"
    six = "::1 :: fe80::1 fd00:ec2::254 fc00::1 ff02::1"
    azure = "168.63.129.16"
    for address in f"{four} {azure} {six}".split():
        assert any(ipaddress.ip_address(address) in network for network in refused), address
    public = "1.1.1.1 9.255.255.255 11.0.0.0 168.63.129.15 168.63.129.17 172.32.0.1 192.169.0.1 2606:4700::1111"
    for address in public.split():
        assert not any(ipaddress.ip_address(address) in network for network in refused), address
    for each in PRIVATE_RANGES:
        allowed = ipaddress.ip_network(each)
        assert not any(ipaddress.ip_address(a) in allowed for a in ("169.254.169.254", "127.0.0.1", "::1")), each


def test_name_servers_of_the_machine_but_not_its_loopback_stub(tmp_path: Path) -> None:
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("# made by systemd-resolved\nnameserver 127.0.0.53\noptions edns0\nsearch lan\n")
    real.write_text("nameserver 10.0.0.2\nnameserver fe80::1%eth0\nnameserver 10.0.0.2\nnameserver x\nnameserver\n")
    assert resolvers([stub, real, tmp_path / "missing"]) == ["10.0.0.2", "fe80::1"]


def test_policy_says_what_a_range_looks_like() -> None:
    found = policy_of(allow=["private", "203.0.113.7"]).networks["egress"]
    assert found.allowed_ranges == (*PRIVATE_RANGES, "203.0.113.7")
    for allow in (["10.0.0.1/8"], ["lan"], [""]):
        with pytest.raises(ValidationError, match=r"a range reads like 10\.1\.0\.0/16"):
            policy_of(allow=allow)
    with pytest.raises(ValidationError, match="the network of two classes"):
        NodePolicy.model_validate({"networks": {"a": {"network": "n"}, "b": {"network": "n", "allow": ["private"]}}})


async def test_without_nft_nothing_is_started_on_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_netfilter, "_NFT_PATH", "/nonexistent")
    with pytest.raises(PolicyViolation, match=r"nft is not installed \(install nftables, or say `guard: false`"):
        await guard_bridge("f" * 64, "br-f", NetworkGuard())


async def test_nft_that_fails_is_said_with_its_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nft = tmp_path / "nft"
    nft.write_text("#!/bin/sh\ncat >/dev/null\necho 'Error: Operation not permitted' >&2\nexit 1\n")
    nft.chmod(0o755)
    monkeypatch.setattr(_netfilter, "_NFT_PATH", str(tmp_path))
    with pytest.raises(PolicyViolation, match=r"nft failed: Error: Operation not permitted \(.*CAP_NET_ADMIN"):
        await guard_bridge("f" * 64, "br-f", NetworkGuard())


async def pause(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


async def test_a_step_never_gets_a_namespace_of_an_unguarded_network(journal: Journal) -> None:
    class Unguardable(FakeRuntime):
        async def guard_network(self, name: str, guard: NetworkGuard) -> None:
            raise PolicyViolation("this machine can't filter", code="network_unguarded")

    runtime = Unguardable(programs={"outrider/pause:1": pause})
    pool = NetPool(runtime, policy_of(), "n1", journal)
    with pytest.raises(PolicyViolation, match="can't filter"):
        await pool.lease("r1", "egress")
    assert not [name for call, name in runtime.calls if call == "create"]
    await NetPool(runtime, policy_of(guard=False), "n1", journal).lease("r1", "egress")
    await runtime.aclose()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_guard_is_put_back_for_as_long_as_the_agent_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_core.networks._LOOK_AGAIN_S", 0.01)
    runtime = FakeRuntime()
    task = asyncio.create_task(keep_guarded(runtime, policy_of(allow=["10.0.0.0/8"])))
    await until(lambda: ("guard_network", "n") in runtime.calls)
    assert runtime.networks == set(), "it makes no network that nobody wants"
    await runtime.ensure_network("n", labels={})
    await until(lambda: runtime.guards)
    runtime.guards.clear()
    await until(lambda: runtime.guards)
    assert runtime.guards["n"].allow == ("10.0.0.0/8",)
    task.cancel()
    await runtime.aclose()


def test_a_step_is_told_what_its_class_allows() -> None:
    assert told_to_step(policy_of(allow=["10.0.0.0/8", "fd00::/8"]), "egress") == {
        "OUTRIDER_NETWORK": "egress",
        "OUTRIDER_NETWORK_ALLOW": "10.0.0.0/8,fd00::/8",
    }
    assert told_to_step(policy_of(), "none") == {"OUTRIDER_NETWORK": "none", "OUTRIDER_NETWORK_ALLOW": ""}
