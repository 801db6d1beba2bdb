from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_core.identities import Identities, owner_of
from agent_core.journal import Journal
from agent_core.removed_objects import RemovedObjects
from agent_core.volumes import AllottedVolume, Volumes, _parts
from outrider.errors import Conflict, InvalidInput, NotFound, OutriderError, PermanentError, TemporaryError


@pytest.fixture
def volumes(tmp_path: Path, journal: Journal) -> Volumes:
    return Volumes(journal, tmp_path / "volumes", Identities(journal), reserve_bytes=0)


async def test_volumes_of_one_owner_belong_to_one_user_and_of_two_to_two(volumes: Volumes) -> None:
    build = await volumes.allot("r1", "game/a", "build", "run", False, None)
    saves = await volumes.allot("r1", "game/a", "saves", "object", True, None)
    other = await volumes.allot("r2", "game/b", "saves", "object", True, None)
    users = [os.stat(volume.host_path).st_uid for volume in (build, saves, other)]
    assert users[0] == users[1]
    assert (users[1] != users[2]) is (os.geteuid() == 0)
    assert os.stat(saves.host_path).st_mode & 0o777 == 0o750


def modes(volume: AllottedVolume, *names: str) -> list[str]:
    return [oct(stat.S_IMODE(os.stat(Path(volume.host_path, name)).st_mode)) for name in names]


async def test_a_volume_is_shared_with_another_user_by_its_group(volumes: Volumes) -> None:
    saves = await volumes.allot("r1", "game/a", "saves", "object", True, None)
    gid = os.stat(saves.host_path).st_gid
    top = Path(saves.host_path)
    # As an agent of before had it: nothing there is open to the group.
    for name, mode in (("dir", 0o755), ("private", 0o700)):
        (top / name).mkdir()
        (top / name).chmod(mode)
    for name, mode in (("dir/a", 0o644), ("dir/run", 0o755), ("dir/key", 0o600), ("private/b", 0o644)):
        (top / name).write_text("x")
        (top / name).chmod(mode)
    await volumes.share([saves.host_path], gid)
    assert modes(saves, "", "dir", "dir/a", "dir/run") == ["0o2770", "0o2775", "0o664", "0o775"]
    assert modes(saves, "dir/key", "private", "private/b") == ["0o600", "0o700", "0o644"]  # closed by intention
    assert {os.stat(top / name).st_gid for name in ("dir", "dir/a", "dir/key")} == {gid}

    (top / "dir" / "made").write_text("x")  # whatever the umask
    (top / "dir" / "chmodded").write_text("x")
    (top / "dir" / "chmodded").chmod(0o644)
    again = await volumes.allot("r2", "game/a", "saves", "object", True, None)
    assert modes(again, "", "dir/made", "dir/chmodded") == ["0o2770", "0o660", "0o664"]


async def test_links_in_a_shared_volume_lead_nowhere(volumes: Volumes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("x")
    outside.chmod(0o755)
    (outside / "passwd").chmod(0o644)
    build = await volumes.allot("r1", None, "build", "run", False, None)
    Path(build.host_path, "file").symlink_to(outside / "passwd")
    Path(build.host_path, "dir").symlink_to(outside)
    os.mkfifo(Path(build.host_path, "pipe"))
    await volumes.share([build.host_path], os.stat(build.host_path).st_gid)
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755
    assert stat.S_IMODE((outside / "passwd").stat().st_mode) == 0o644


async def test_what_is_everybodys_stays_so(volumes: Volumes) -> None:
    cache = await volumes.allot("r1", "game/a", "cache", "node", False, None)
    before = os.stat(cache.host_path)
    await volumes.share([cache.host_path], before.st_gid + 1)
    assert (os.stat(cache.host_path).st_gid, os.stat(cache.host_path).st_mode) == (before.st_gid, before.st_mode)
    with pytest.raises(NotFound, match="is not there any more"):
        await volumes.share([cache.host_path.replace("node/cache", "run/r9/gone")], 1)


async def test_the_same_volume_is_found_again(volumes: Volumes) -> None:
    first = await volumes.allot("r1", "game/a", "saves", "object", True, None)
    Path(first.host_path, "world").write_text("x")
    again = await volumes.allot("r2", "game/a", "saves", "object", True, None)
    assert again.host_path == first.host_path
    assert Path(again.host_path, "world").exists()


async def test_volumes_of_a_run_go_with_it_and_others_stay(volumes: Volumes) -> None:
    build = await volumes.allot("r1", "game/a", "build", "run", False, None)
    kept = await volumes.allot("r1", "game/a", "kept", "run", True, None)
    saves = await volumes.allot("r1", "game/a", "saves", "object", False, None)
    cache = await volumes.allot("r1", "game/a", "cache", "node", False, None)
    Path(build.host_path, "dir").mkdir()
    Path(build.host_path, "dir", "link").symlink_to(saves.host_path)
    Path(saves.host_path, "world").write_text("x")
    await volumes.release_run("r1")
    assert [Path(v.host_path).exists() for v in (build, kept, saves, cache)] == [False, True, True, True]
    assert Path(saves.host_path, "world").exists()  # the link was removed, not followed
    await volumes.release_object("game/a")
    assert not Path(saves.host_path).exists()


async def test_volumes_of_a_removed_object_go_unless_it_is_there_again(volumes: Volumes) -> None:
    saves = await volumes.allot("r1", "game/a", "saves", "object", False, None)
    await volumes.allot("r1", "game/b", "kept", "object", True, None)
    await volumes.allot("r1", "game/c", "build", "run", False, None)
    asked: list[object] = []
    busy = ["game/a"]

    async def ask(refs: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        asked.append(refs)
        return set(refs)

    removed = RemovedObjects(volumes, ask, lambda: busy)
    await removed.once()
    assert asked == [[("game", "a")]]
    assert Path(saves.host_path).exists()  # a run was given it since the server was asked
    busy.clear()
    await removed.once()
    assert not Path(saves.host_path).exists()
    await removed.once()
    assert len(asked) == 2  # of what is gone, or is to be kept, nothing is asked


async def test_a_volume_that_is_allotted_again_while_it_is_collected_is_there(volumes: Volumes) -> None:
    saves = await volumes.allot("r1", "game/a", "saves", "object", False, None)
    for _ in range(20):
        await asyncio.gather(
            volumes.release_object("game/a"), volumes.allot("r2", "game/a", "saves", "object", False, None)
        )
        assert Path(saves.host_path).exists() or await volumes.objects() == []
        await volumes.allot("r2", "game/a", "saves", "object", False, None)


async def test_a_server_that_does_not_know_the_question_is_asked_later(
    volumes: Volumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_core.removed_objects.INTERVAL_S", 0.01)
    saves = await volumes.allot("r1", "game/a", "saves", "object", False, None)
    answers: list[set[tuple[str, str]] | None] = [None, {("game", "a")}]

    async def ask(_refs: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        if (answer := answers.pop(0)) is None:
            raise PermanentError("the server does not know FindRemovedObjects")
        return answer

    asking = asyncio.create_task(RemovedObjects(volumes, ask, list).run())
    async with asyncio.timeout(10):
        while Path(saves.host_path).exists():
            await asyncio.sleep(0.01)
    asking.cancel()


async def test_volume_in_use_by_a_container_is_kept_until_it_is_gone(volumes: Volumes) -> None:
    build = await volumes.allot("r1", None, "build", "run", False, None)
    await volumes.use("game", [build.host_path])
    await volumes.release_run("r1")
    assert Path(build.host_path).exists()
    await volumes.unuse("game")
    assert not Path(build.host_path).parent.exists()


async def test_identity_of_a_run_is_given_back_with_its_last_volume(volumes: Volumes, journal: Journal) -> None:
    users = Identities(journal)
    await volumes.allot("r1", None, "build", "run", False, None)
    await users.allot(owner_of("r2", None))  # a run without a volume
    await volumes.allot("r3", None, "kept", "run", True, None)
    for run_id in ("r1", "r2", "r3"):
        await volumes.release_run(run_id)
    left = [row["owner"] for row in journal.query_now("SELECT owner FROM identities WHERE owner LIKE '%:%'")]
    assert left == ([owner_of("r3", None)] if os.geteuid() == 0 else [])


async def test_link_in_the_place_of_a_directory_is_not_followed(volumes: Volumes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "volumes" / "object").mkdir()
    (tmp_path / "volumes" / "object" / "game").symlink_to(outside)
    with pytest.raises(Conflict, match="not a directory"):
        await volumes.allot("r1", "game/a", "saves", "object", True, None)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("run_id", "object_ref", "name", "scope"),
    [
        ("r1", "game/a", "../x", "run"),
        ("r1", "game/a", "a/b", "run"),
        ("r1", "game/..", "a", "object"),
        ("r1", "../a", "a", "object"),
        ("..", None, "a", "run"),
        ("r1", None, "a", "object"),
        ("r1", "game/a\n", "a", "object"),
    ],
)
async def test_names_that_are_none_are_refused(
    volumes: Volumes, tmp_path: Path, run_id: str, object_ref: str | None, name: str, scope: str
) -> None:
    with pytest.raises(InvalidInput):
        await volumes.allot(run_id, object_ref, name, scope, False, None)  # type: ignore[arg-type]
    assert list((tmp_path / "volumes").iterdir()) == []


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.sampled_from(["run", "object", "node"]))
def test_no_name_leads_out_of_the_root(run_id: str, object_ref: str, name: str, scope: str) -> None:
    try:
        parts = _parts(run_id, object_ref, name, scope)  # type: ignore[arg-type]
    except OutriderError:
        return
    assert os.path.normpath("/root/" + "/".join(parts)) == "/root/" + "/".join(parts)
    assert not any(part.startswith(".") for part in parts)


async def test_usage_is_measured_and_what_grew_too_large_is_told(volumes: Volumes) -> None:
    small = await volumes.allot("r1", None, "small", "run", False, 64 * 1024)
    large = await volumes.allot("r1", None, "large", "run", False, 64 * 1024**2)
    assert {small.quota, large.quota} == {"watch"}
    for volume in (small, large):
        Path(volume.host_path, "data").write_bytes(b"x" * 256 * 1024)
        os.link(Path(volume.host_path, "data"), Path(volume.host_path, "again"))
    usage = {item.name: item for item in await volumes.usage("r1")}
    assert 256 * 1024 <= usage["large"].used_bytes < 400 * 1024  # a second name takes nothing up
    assert [item.name for item in await volumes.over_quota()] == ["small"]


async def test_reserve_of_free_disk_is_not_given_out(tmp_path: Path, journal: Journal) -> None:
    full = Volumes(journal, tmp_path / "volumes", Identities(journal), reserve_bytes=2**60)
    with pytest.raises(TemporaryError, match="less than the reserve"):
        await full.allot("r1", None, "build", "run", False, None)
    assert full.free_bytes() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
async def test_a_number_given_back_goes_to_nobody_else_for_long(journal: Journal) -> None:
    """What the former owner left in a volume of the node, or runs still, would be the next one's."""
    users = Identities(journal, first=1000, last=1003)
    given = []
    for number in range(8):
        given.append((await users.allot(f"run:{number}"))[0])
        await users.release(f"run:{number}")
    assert given == [1000, 1001, 1002, 1003, 1000, 1001, 1002, 1003]
    assert (await users.allot("object:a/b"))[0] == 1000
    assert (await Identities(journal, first=1000, last=1003).allot("run:9"))[0] == 1001


@pytest.mark.skipif(os.geteuid() != 0, reason="only root allots user ids")
async def test_the_user_id_of_a_run_that_a_kill_left_to_nobody_is_given_back(
    volumes: Volumes, journal: Journal
) -> None:
    users = Identities(journal)
    await volumes.allot("r1", None, "build", "run", False, None)
    await users.allot(owner_of("r2", None))  # its last volume is gone, and the agent was killed then
    await users.allot(owner_of("r3", None))  # has only begun
    await volumes.forget_runs(active=lambda: ["r3"])
    left = {str(row["owner"]) for row in journal.query_now("SELECT owner FROM identities WHERE owner LIKE 'run:%'")}
    assert left == {"run:r1", "run:r3"}
