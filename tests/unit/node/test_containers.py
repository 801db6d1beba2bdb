from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from agent_core.container_spec import GrantedVolume, ManagedSpec, substitute
from agent_core.containers import Containers
from agent_core.policy import NodePolicy
from agent_core.ports import Ports
from agent_core.runtimes.base import (
    LABEL_ATTEMPT,
    LABEL_KIND,
    LABEL_NAME,
    LABEL_NODE,
    LABEL_OBJECT,
    LABEL_RUN,
    LABEL_SECRETS,
    LABEL_SPEC,
    LABEL_STEP,
    ContainerSpec,
)
from agent_core.runtimes.fake import FakeProcess
from agent_core.transitions import Transition
from outrider.errors import (
    Conflict,
    EngineUnavailable,
    ErrorClass,
    InvalidInput,
    NotFound,
    OutriderError,
    PermanentError,
    PolicyViolation,
)

if TYPE_CHECKING:
    from conftest import Parts


def spec(**more: Any) -> ManagedSpec:
    return ManagedSpec.parse({"name": "arena", "image": "game:1", "ready": {"log": "is up"}} | more)


async def test_with_pull_always_a_start_asks_the_registry_once(parts: Parts) -> None:
    policy = NodePolicy.model_validate({"images": {"pull": "always"}})
    containers = Containers(parts.runtime, parts.journal, parts.ports, parts.volumes, policy, "n1")
    for replace in ("no", "stop-first"):
        by_hand = dataclasses.replace(parts.scope, run_id="", step="")
        started = await containers.start(spec(env={"HOW": replace}), by_hand, replace=replace)
        assert not started.adopted
    assert [call for call in parts.runtime.calls if call[0] == "pull_image"] == [("pull_image", "game:1")] * 2


async def test_leased_ports_are_known_to_the_container_before_it_exists(parts: Parts) -> None:
    wanted = spec(
        ports=[{"name": "game", "protocol": "udp", "container": 27960}, {"name": "same"}],
        env={"SV_PORT": "$(ports.game)", "LITERAL": "$$(ports.game)"},
        args=["+port", "$(ports.same)"],
    )
    started = await parts.containers.start(wanted, parts.scope)
    made = parts.runtime.spec_of("arena")
    assert made.env == {"SV_PORT": str(started.ports["game"]), "LITERAL": "$(ports.game)"}
    assert made.args == ("+port", str(started.ports["same"]))
    assert [(p.container, p.host, p.protocol) for p in made.ports] == [
        (27960, started.ports["game"], "udp"),
        (started.ports["same"], started.ports["same"], "tcp"),
    ]
    assert made.user == "200001:200001"
    assert made.cap_add == ()
    assert made.read_only_root


async def test_stop_signal_that_is_named_is_the_containers_own(parts: Parts) -> None:
    for name, signal in (("arena", "SIGUSR1"), ("other", None)):
        await parts.containers.start(spec(name=name, stop_signal=signal), parts.scope)
        assert parts.runtime.spec_of(name).stop_signal == signal
    with pytest.raises(InvalidInput, match="stop_signal"):
        spec(stop_signal="kill -9")


@pytest.mark.parametrize(
    ("user", "groups", "mode"), [(None, (), 0o750), ("1000:1000", (200001,), 0o2770), ("steam", (200001,), 0o2770)]
)
async def test_a_container_that_declares_another_user_is_in_the_group_of_its_volumes(
    parts: Parts, user: str | None, groups: tuple[int, ...], mode: int
) -> None:
    policy = NodePolicy.model_validate({"managed": {"users": ["1000:1000", "steam"]}})
    containers = Containers(parts.runtime, parts.journal, parts.ports, parts.volumes, policy, "n1")
    saves = await parts.volumes.allot("r1", "game/a", "saves", "run", False, None)
    scope = dataclasses.replace(parts.scope, volumes={"saves": GrantedVolume(saves.host_path, True)})
    await containers.start(spec(user=user, volumes={"saves": "/data:rw"}), scope)
    assert parts.runtime.spec_of("arena").user == (user or "200001:200001")
    assert parts.runtime.spec_of("arena").groups == groups
    assert stat.S_IMODE(os.stat(saves.host_path).st_mode) == mode


async def test_a_port_listens_on_an_interface_that_the_policy_has_by_its_name(parts: Parts) -> None:
    policy = NodePolicy.model_validate({"ports": {"interfaces": {"private": "127.0.0.2"}}})
    leases = Ports(parts.journal, (28700, 28799), interfaces=policy.ports.interfaces)
    containers = Containers(parts.runtime, parts.journal, leases, parts.volumes, policy, "n1")
    ports = [{"name": "game"}, {"name": "rcon", "interface": "private"}]
    await containers.start(spec(ports=ports), parts.scope)
    assert [port.host_ip for port in parts.runtime.spec_of("arena").ports] == ["0.0.0.0", "127.0.0.2"]
    with pytest.raises(PolicyViolation, match="ports on the interface 'public'") as refused:
        await containers.start(spec(name="b", ports=[{"name": "x", "interface": "public"}]), parts.scope)
    assert refused.value.hint == "ports.interfaces: private"
    with pytest.raises(InvalidInput, match="with the host's network nothing is published"):
        spec(network="host", ports=ports)


async def test_step_started_twice_starts_one_container(parts: Parts) -> None:
    both = await asyncio.gather(*(parts.containers.start(spec(), parts.scope) for _ in range(2)))
    assert both[0].id == both[1].id
    assert [call for call in parts.runtime.calls if call[0] == "create"] == [("create", "arena")]


async def test_agent_killed_between_create_and_start_starts_what_is_there(parts: Parts) -> None:
    """The journal says "starting", the container exists: its name is ours, so it is adopted and started."""
    started = await parts.containers.start(spec(), parts.scope)
    await parts.runtime.stop("arena", grace_s=1)
    await parts.journal.execute(Transition.MANAGED_STARTING, "UPDATE managed SET state = 'starting'")
    again = await parts.containers.start(spec(), parts.scope)
    assert (again.id, again.adopted) == (started.id, True)
    assert (await parts.containers.inspect("arena")).state == "running"


async def test_failed_start_leaves_nothing_behind(parts: Parts) -> None:
    with pytest.raises(PermanentError, match=r"ended with exit code 7 before it was ready(.|\n)*no such map"):
        await parts.containers.start(
            spec(image="crash:1", ports=[{"name": "game"}], volumes={"saves": "/data"}), parts.scope
        )
    with pytest.raises(NotFound, match="image gone:1"):
        await parts.containers.start(spec(image="gone:1", ports=[{"name": "game"}]), parts.scope)
    assert await parts.runtime.list() == []
    for table in ("port_leases", "volume_uses", "managed"):
        assert await parts.journal.query(f"SELECT * FROM {table}") == []


@pytest.mark.parametrize(("port", "kind"), [({}, ErrorClass.TEMPORARY), ({"host": 28750}, ErrorClass.PERMANENT)])
async def test_port_that_somebody_took_before_the_start_may_be_another_one_the_next_time(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, port: dict[str, int], kind: ErrorClass
) -> None:
    async def start(container: str) -> None:
        raise Conflict("the port is taken on this node", code="port_taken")

    monkeypatch.setattr(parts.runtime, "start", start)
    with pytest.raises(OutriderError, match="is taken on this node") as refused:
        await parts.containers.start(spec(ports=[{"name": "game", "protocol": "udp", **port}]), parts.scope)
    assert (refused.value.code, refused.value.error_class) == ("port_taken", kind)
    monkeypatch.undo()
    started = await parts.containers.start(spec(ports=[{"name": "game", "protocol": "udp", **port}]), parts.scope)
    assert started.ports["game"] == port.get("host", 28701)


async def test_game_that_was_ready_once_is_not_removed_for_failing_to_start_again(parts: Parts) -> None:
    wanted = spec(ready={"log": "is up", "timeout_s": 0.2})
    await parts.containers.start(wanted, parts.scope)
    await parts.containers.stop("arena")
    parts.runtime.spec_of("arena")

    async def broken(process: FakeProcess) -> int:
        return 3

    parts.runtime.programs["game:1"] = broken
    with pytest.raises(PermanentError, match="its log is empty"):
        await parts.containers.start(wanted, parts.scope)
    assert (await parts.containers.inspect("arena")).name == "arena"


@pytest.mark.parametrize("killed", [False, True])
async def test_readiness_by_a_line_of_the_log_is_not_what_the_former_run_printed(parts: Parts, killed: bool) -> None:
    """``killed``: an agent was between the restart and the line, and the next one finds it running."""
    wanted = spec(ready={"log": "is up", "timeout_s": 0.3})
    await parts.containers.start(wanted, parts.scope)
    await parts.containers.stop("arena")

    async def mute(process: FakeProcess) -> int:
        await process.signalled.wait()
        return 0

    game, parts.runtime.programs["game:1"] = parts.runtime.programs["game:1"], mute
    if killed:
        await parts.containers.start_existing("arena")
        await parts.journal.execute(Transition.MANAGED_STARTING, "UPDATE managed SET state = 'starting'")
    with pytest.raises(PermanentError, match=r"was not ready within 0\.3 s \(its log has no 'is up'\)"):
        await parts.containers.start(wanted, parts.scope)
    parts.runtime.programs["game:1"] = game
    if not killed:  # else it was undone, as what never was ready is
        await parts.containers.stop("arena")
    assert (await parts.containers.start(wanted, parts.scope)).adopted is not killed


async def test_error_of_a_start_has_the_end_of_the_log_and_fits_into_what_a_step_may_say(parts: Parts) -> None:
    async def wordy(process: FakeProcess) -> int:
        for number in range(20):
            process.write(f"{number}: {'word ' * 32}\n".encode())
        process.write(b"the password is hunter2zebra\n")
        process.write(b"FATAL: no such map\n")
        return 7

    parts.runtime.programs["wordy:1"] = wordy
    scope = dataclasses.replace(parts.scope, secrets=("hunter2zebra",))
    await parts.containers.start(spec(), scope)
    with pytest.raises(PermanentError) as failed:
        await parts.containers.start(spec(image="wordy:1"), scope, replace="stop-first")
    said = str(failed.value)
    assert said.endswith("the password is ***\nFATAL: no such map")
    assert len(said) < 1600
    before, _, log = said.partition("; its log ends with:\n…")
    assert "the former container runs again" in before
    assert all(line[0].isdigit() and line.endswith("word") for line in map(str.strip, log.splitlines()[:-2]))
    assert len(log.splitlines()) >= 7


async def test_attempt_that_is_over_takes_its_unfinished_start_with_it(parts: Parts) -> None:
    never = spec(ready={"log": "never", "timeout_s": 60}, ports=[{"name": "game"}])
    start = asyncio.create_task(parts.containers.start(never, parts.scope))
    while not any(call[0] == "logs" for call in parts.runtime.calls):
        await asyncio.sleep(0.01)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    assert len(await parts.runtime.list()) == 1  # the agent may only be stopping
    await parts.containers.end_attempt(parts.scope)
    assert await parts.runtime.list() == []
    assert parts.ports.held("arena") == {}


async def test_container_that_the_engine_makes_though_nobody_waits_any_more_is_undone_too(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = parts.runtime.create
    asked = asyncio.Event()

    async def create(container: ContainerSpec) -> str:
        async def made() -> str:
            await asyncio.sleep(0.2)
            return await engine(container)

        asked.set()
        return await asyncio.shield(asyncio.create_task(made()))

    monkeypatch.setattr(parts.runtime, "create", create)
    start = asyncio.create_task(parts.containers.start(spec(), parts.scope))
    await asked.wait()
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    await parts.containers.end_attempt(parts.scope)
    await asyncio.sleep(0.3)
    assert await parts.runtime.list() == []


async def test_no_more_volumes_than_the_step_has(parts: Parts) -> None:
    with pytest.raises(PolicyViolation, match=r"volume other, which its step was not given \(the step has: saves\)"):
        await parts.containers.start(spec(volumes={"other": "/data"}), parts.scope)
    with pytest.raises(PolicyViolation, match="which its step has read-only"):
        await parts.containers.start(spec(volumes={"saves": "/data:rw"}), parts.scope)
    for target in ("data", "/", "/proc/x", "/a/../b", "/outrider", "/data:rx", "//x"):
        with pytest.raises(InvalidInput):
            await parts.containers.start(spec(volumes={"saves": target}), parts.scope)
    assert await parts.runtime.list() == []


async def test_containers_of_the_agent_are_not_the_operators(parts: Parts) -> None:
    labels = {LABEL_NODE: "n1", LABEL_KIND: "step"}
    step = await parts.runtime.create(ContainerSpec(name="step", image="game:1", labels=labels))
    await parts.runtime.start(step)
    with pytest.raises(PolicyViolation, match="cancel its run instead"):
        await parts.containers.stop("step")
    foreign = await parts.runtime.create(ContainerSpec(name="arena", image="game:1"))
    with pytest.raises(Conflict, match="not Outrider's to use"):
        await parts.containers.start(spec(), parts.scope)
    assert (await parts.runtime.inspect(foreign)).state == "created"


async def test_engine_that_is_away_is_said_so(parts: Parts) -> None:
    parts.runtime.stop_engine()
    with pytest.raises(EngineUnavailable):
        await parts.containers.start(spec(), parts.scope)


@pytest.mark.parametrize(
    "more",
    [
        {"ports": [{"name": "a"}, {"name": "a"}]},
        {"ready": {"tcp": {"port": "nope"}}},
        {"ready": {"log": "x", "tcp": {"port": "a"}}},
        {"env": {"X": "$(ports.nope)"}},
        {"env": {"1X": ""}},
        {"name": "a/b"},
        {"unknown": 1},
        {"privileged": True},
        {"network": "none", "ports": [{"name": "a"}]},
    ],
)
def test_wrong_specifications_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="specification is not valid"):
        spec(**more)


def test_substitution_touches_nothing_else() -> None:
    assert substitute("a $(ports.x) $$(ports.x) $HOME ${Y} $(", {"x": 5}) == "a 5 $(ports.x) $HOME ${Y} $("


async def test_asking_for_names_that_are_none_leaves_nothing_behind(parts: Parts) -> None:
    for number in range(100):
        with pytest.raises(NotFound):
            await parts.containers.remove(f"nobody-{number}", scope=parts.scope)
    assert len(parts.containers._locks) == 0


@pytest.mark.parametrize("volumes", [{"saves": "/d", "build": "/d/x"}, {"saves": "/d", "build": "/d/"}])
async def test_volumes_of_a_container_lie_side_by_side(parts: Parts, volumes: dict[str, str]) -> None:
    granted = dict.fromkeys(volumes, GrantedVolume("/v", writable=True))
    scope = dataclasses.replace(parts.scope, volumes=granted)
    with pytest.raises(InvalidInput, match="side by side"):
        await parts.containers.start(ManagedSpec(name="x", image="game:1", volumes=volumes), scope)


async def test_no_label_of_ours_is_left_to_the_image(parts: Parts) -> None:
    """An image with `LABEL outrider.object=game/victim` would make its container one of that object's."""
    scope = dataclasses.replace(parts.scope, object_ref=None)
    await parts.containers.start(ManagedSpec(name="x", image="game:1"), scope)
    labels = parts.runtime.spec_of("x").labels
    assert labels[LABEL_OBJECT] == ""
    assert {LABEL_NODE, LABEL_KIND, LABEL_NAME, LABEL_SPEC, LABEL_RUN, LABEL_STEP, LABEL_ATTEMPT} <= set(labels)


async def test_a_secret_with_the_sign_of_a_placeholder_is_known_as_one(parts: Parts) -> None:
    """Steps write its `$(` as `$$(`, so that it is not replaced."""
    scope = dataclasses.replace(parts.scope, secrets=("hunter$(2)$$(3)zebra",))
    spec = ManagedSpec(name="x", image="game:1", env={"KEY": "hunter$$(2)$$$(3)zebra", "PLAIN": "a"})
    await parts.containers.start(spec, scope)
    made = parts.runtime.spec_of("x")
    assert made.env["KEY"] == "hunter$(2)$$(3)zebra"
    assert made.labels[LABEL_SECRETS] == "KEY"
