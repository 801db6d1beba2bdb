from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from agent_core.config import AgentConfig
from agent_core.policy import NodePolicy
from outrider import settings
from outrider.errors import InvalidInput, PolicyViolation
from outrider.steps import Resources, StepPlan


def load(tmp_path: Path, text: str) -> NodePolicy:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    return NodePolicy.load(file)


def test_without_a_file_the_defaults_are_safe() -> None:
    policy = NodePolicy.load(None)
    policy.check_plan(StepPlan(image="anything:1", network="egress"))
    assert policy.network_of("none") == "none"
    assert not policy.control_foreign
    for addition in (
        {"capabilities": ("NET_ADMIN",)},
        {"devices": ("/dev/kvm",)},
        {"host_network": True},
        {"user": "0:0"},
    ):
        with pytest.raises(PolicyViolation):
            check(policy, **addition)


def check(policy: NodePolicy, **addition: object) -> None:
    nothing = {"capabilities": (), "devices": (), "host_network": False, "writable_root": False, "user": None}
    policy.check_additions(**(nothing | addition))  # type: ignore[arg-type]


def test_images_and_registries_are_limited(tmp_path: Path) -> None:
    policy = load(
        tmp_path, "images: {allow: ['outrider/*', 'reg.example:5000/*'], registries: [docker.io, reg.example:5000]}"
    )
    policy.check_image("outrider/base:1")
    policy.check_image("reg.example:5000/game:1")
    with pytest.raises(PolicyViolation, match=r"does not allow the image evil/x:1 \(images.allow: outrider/\*"):
        policy.check_image("evil/x:1")


def test_what_is_allowed_by_name_is_allowed(tmp_path: Path) -> None:
    policy = load(tmp_path, "managed: {capabilities: [cap_net_admin], devices: [/dev/kvm], users: ['0:*']}")
    check(policy, capabilities=("NET_ADMIN",), devices=("/dev/kvm",), user="0:0")
    with pytest.raises(PolicyViolation, match="capability SYS_ADMIN"):
        check(policy, capabilities=("SYS_ADMIN",))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"policy\.yaml can't be read: line 2: the key 'managed' stands twice"):
        load(tmp_path, "managed: {host_network: false}\nmanaged: {host_network: true}")
    file = tmp_path / "agent.yaml"
    file.write_text("node_id: n1\nserver: a:1\nserver: b:1")
    with pytest.raises(InvalidInput, match=r"agent\.yaml can't be read: line 3: the key 'server' stands twice"):
        settings.load(AgentConfig, env_prefix="X_", environ={}, file=file)


@pytest.mark.parametrize("interfaces", [{"private": "eth1"}, {"private": ""}, {"10.0.0.1": "10.0.0.1"}])
def test_an_interface_is_an_address_by_a_name(interfaces: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        NodePolicy.model_validate({"ports": {"interfaces": interfaces}})


def test_users_need_no_quotes(tmp_path: Path) -> None:
    # YAML 1.1 reads 1000:50 as a number to the base of 60.
    check(load(tmp_path, "managed: {users: [1000:50]}"), user="1000:50")


def test_limits_are_filled_in_and_held(tmp_path: Path) -> None:
    policy = load(tmp_path, "limits: {memory_bytes: 536870912, max_memory_bytes: 1073741824, max_cpus: 1}")
    assert policy.limits_for(Resources()) == Resources(memory_bytes=512 * 1024**2, cpus=1, pids=512)
    with pytest.raises(PolicyViolation, match="over this node's limit of 1073741824"):
        policy.limits_for(Resources(memory_bytes=2 * 1024**3))


def test_unknown_network_class_names_those_there_are() -> None:
    with pytest.raises(PolicyViolation, match=r"no network class 'lan' \(it has: none, egress\)"):
        NodePolicy().check_plan(StepPlan(image="x", network="lan"))


def test_step_never_runs_as_root() -> None:
    for user in ("0", "0:0", "root", "root:users", "00"):
        with pytest.raises(PolicyViolation, match="as root"):
            NodePolicy().check_plan(StepPlan(image="x", user=user))


def test_every_problem_of_the_file_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(tmp_path, "ports: {range: 5-2}\nimage: {}\nnetworks: {none: {network: x}}\nlimits: {cpus: -1}")
    assert len(caught.value.problems) == 4
    assert {problem.path.split(".")[0] for problem in caught.value.problems} == {"ports", "image", "networks", "limits"}
    assert "image: there is no such setting (did you mean images?)" in str(caught.value)
    for text in ("- a list", "{", "ports: {range: many}"):
        with pytest.raises(InvalidInput):
            load(tmp_path, text)
    with pytest.raises(InvalidInput, match="does not exist"):
        NodePolicy.load(tmp_path / "none.yaml")
