"""What a managed container may be asked to be: paths, ports and devices for all inputs, and digests that stay."""

from __future__ import annotations

import posixpath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_core.container_spec import (
    ContainerScope,
    GrantedVolume,
    ManagedSpec,
    device_of,
    digest_of,
    mounts_of,
    substitute,
)
from agent_core.policy import NodePolicy
from agent_core.ports import PortWish
from agent_core.runtimes.base import Mount
from outrider.errors import InvalidInput, PolicyViolation

SCOPE = ContainerScope("r1", "start", 1, "game/a", {"saves": GrantedVolume("/v/saves", True)})
PARTS = st.sampled_from(["data", "etc", "..", ".", "", "proc", "x.cfg", "outrider", "a b", "ä"])
PATHS = st.builds(
    lambda parts, end: "/" + "/".join(parts) + end, st.lists(PARTS, max_size=5), st.sampled_from(["", "/"])
)


def spec(**more: Any) -> ManagedSpec:
    return ManagedSpec.parse({"name": "arena", "image": "game:1"} | more)


@given(PATHS, PATHS)
def test_files_lie_in_plain_places_and_never_inside_a_volume(file: str, volume: str) -> None:
    wanted = spec(files={file: {"text": "x"}}, volumes={"saves": f"{volume}:rw"} if ":" not in volume else {})
    try:
        mounts = mounts_of(wanted, SCOPE)
    except InvalidInput:
        return
    assert file == posixpath.normpath(file)
    assert not file.startswith(("/proc/", "/sys/", "/dev/", "/outrider/"))
    for mount in mounts:
        assert posixpath.commonpath([file, mount.target]) not in (file, mount.target)


@given(st.integers(-5, 70_000), st.integers(-5, 70_000))
def test_a_range_of_ports_is_two_ports_in_order(first: int, last: int) -> None:
    document = {"ports": [{"name": "game", "range": [first, last]}]}
    if 1 <= first <= last <= 65535:
        [wish] = spec(**document).wishes()
        assert [port for port in (first - 1, first, last, last + 1) if wish.fits(port)] == sorted([first, last])
    else:
        with pytest.raises(InvalidInput):
            spec(**document)


def test_one_number_for_both_protocols() -> None:
    assert PortWish("game", "tcp+udp").protocols == ("tcp", "udp")
    assert PortWish("game", "udp").protocols == ("udp",)


@given(st.text(alphabet="/devxyz.:rwm0-", max_size=30))
def test_a_device_is_one_below_dev(text: str) -> None:
    try:
        found = device_of(text)
    except ValueError:
        return
    for path in (found.host, found.container):
        assert path.startswith("/dev/")
        assert path == posixpath.normpath(path)
    assert set(found.permissions) <= set("rwm")


def test_devices_are_the_policys_to_allow() -> None:
    policy = NodePolicy.model_validate({"managed": {"devices": ["/dev/dri/*", "/dev/fuse"]}})
    nothing: dict[str, Any] = {
        "capabilities": (), "host_network": False, "writable_root": False, "user": None
    }  # fmt: skip
    policy.check_additions(devices=("/dev/dri/renderD128", "/dev/fuse"), **nothing)
    for device in ("/dev/mem", "/dev/fuse2", "/dev/dri"):
        with pytest.raises(PolicyViolation, match=f"the device {device}"):
            policy.check_additions(devices=(device,), **nothing)


@given(st.text(max_size=60), st.integers(1, 65535))
def test_data_with_its_signs_doubled_comes_through_as_it_is(data: str, port: int) -> None:
    assert substitute(data.replace("$(", "$$("), {"x": port}) == data


def test_a_container_made_by_an_agent_of_before_is_known_again() -> None:
    """The digest of a specification that uses nothing new, as the first version computed it."""
    wanted = spec(
        image="game/arena:7",
        args=["+port", "$(ports.game)"],
        env={"A": "b"},
        ports=[
            {"name": "game", "container": 27960, "protocol": "udp"},
            {"name": "http", "container": 8080, "host": 27100},
        ],
        ready={"log": "up"},
        resources={"memory_bytes": 536870912},
        volumes={"saves": "/data:rw"},
    )  # fmt: skip
    mounts = (Mount("/v/saves", "/data", True),)
    digest = digest_of(wanted, mounts, "200001:200001")
    assert digest == "9b9ad30f1b180a9fb450b34fd2680cca9b2e30baf92fd1e47f47bcad97252aec"
    watched = wanted.model_copy(update={"live": spec(live={"log": "broken"}).live})
    assert digest_of(watched, mounts, "200001:200001") == digest  # how it is watched makes no other container of it


@pytest.mark.parametrize(
    "more",
    [
        {"live": {"log": "x", "interval_s": 0.5}},
        {"live": {"exec": {"args": []}}},
        {"live": {"tcp": {"port": "nope"}}},
        {"ports": [{"name": "game", "protocol": "udp"}], "ready": {"tcp": {"port": "game"}}},
        {"ports": [{"name": "game", "host": 27000, "range": [27000, 27010]}]},
        {"restart": {"policy": "sometimes"}},
        {"labels": {"outrider.object": "game/victim"}},
        {"labels": {"-x": "y"}},
        {"files": {"/x": {"text": "y" * 300_000}}},
        {"files": {"/x": {"text": "$(ports.nope)"}}},
        {"devices": ["/etc/shadow"]},
        {"devices": ["/dev/../etc/shadow"]},
        {"private_network": True, "network": "host"},
        {"aliases": ["db"]},
        {"private_network": True, "aliases": ["Not A Name"]},
    ],
)
def test_what_can_not_be_meant_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="specification is not valid"):
        spec(**more)
