"""Backups are whole or refused, hold no key in the clear, and come back as a server that numbers nothing twice."""

from __future__ import annotations

import contextlib
import io
import json
import random
import sqlite3
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import zstandard
from sqlalchemy import Connection

from outrider.errors import Conflict, InvalidInput, OutriderError
from outrider.v1 import node_service_pb2, types_pb2
from server_core import backup
from server_core.config import ServerConfig
from server_core.restore import restore
from server_core.security import vault
from server_core.server import init
from server_core.store import audit, envs, events, nodes, objects, restored, runs
from server_core.store.commits import Commit
from server_core.store.sqlite import SqliteDatabase
from server_core.store.tokens import Caller

PASSPHRASE = b"correct horse battery"
ARENA = types_pb2.ObjectRef(kind="game", name="arena")


@pytest.fixture
async def config(tmp_path: Path) -> ServerConfig:
    """A server that was used and is stopped."""
    config = ServerConfig(data_dir=tmp_path / "first")
    await init(config)
    key = vault.read_master_key(config.key_file)

    def work(connection: Connection) -> None:
        opened = vault.open_vault(connection, key, 0)
        nodes.add(connection, "n1", {}, "")
        register = node_service_pb2.RegisterRequest()
        for session in ("s1", "s2"):
            nodes.begin_session(connection, "n1", register, session, "")
        objects.put(connection, ARENA, {"slots": 16}, replace=False, expected_version=None)
        sealed = opened.seal(b"hunter22", vault.env_purpose("builds", "KEY"))
        envs.put(connection, "builds", {"KEY": sealed}, [], None)
        runs.accept(connection, new_run("r1", objects.get(connection, ARENA)))
        events.add(connection, "run.accepted", "r1", node_id="n1")

    db = SqliteDatabase(config.store_file)
    db.write_now(Commit.SERVER_START, work)
    db.close()
    return config


def new_run(run_id: str, of: types_pb2.Object | None = None) -> runs.NewRun:
    steps = [types_pb2.StepStatus(name="a")]
    return runs.NewRun(run_id, "l", "operator:a", run_id, b"", "p", b"", b"", "n1", of, {}, [], 0, steps)


def elsewhere(config: ServerConfig, name: str = "second") -> ServerConfig:
    return ServerConfig(data_dir=config.data_dir.with_name(name))


def restore_file(config: ServerConfig, file: Path, **options: object) -> object:
    with file.open("rb") as source:
        return restore(config, source, **options)  # type: ignore[arg-type]


def refusal(config: ServerConfig, file: Path, **options: object) -> OutriderError:
    with pytest.raises(OutriderError) as caught:
        restore_file(config, file, **options)
    return caught.value


def test_backup_with_a_passphrase_makes_the_server_again_on_another_machine(
    config: ServerConfig, tmp_path: Path
) -> None:
    file = tmp_path / "backup"
    backup.make(config, file, passphrase=PASSPHRASE)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "first"]
    there = elsewhere(config)
    restore_file(there, file, passphrase=PASSPHRASE)
    for name in ("master.key", "tls/ca.key", "tls/ca.pem"):
        assert (there.data_dir / name).read_bytes() == (config.data_dir / name).read_bytes()
    assert stat.S_IMODE((there.data_dir / "master.key").stat().st_mode) == 0o600
    db = SqliteDatabase(there.store_file)
    opened = db.write_now(Commit.SERVER_START, lambda c: vault.open_vault(c, vault.read_master_key(there.key_file), 0))
    sealed = db.write_now(Commit.SERVER_START, lambda c: envs.sealed_value(c, "builds", "KEY"))
    assert sealed is not None
    assert opened.open(sealed, vault.env_purpose("builds", "KEY")) == b"hunter22"
    db.close()
    assert not (there.data_dir / ".restore").exists()


def test_no_key_is_in_a_backup_in_the_clear(config: ServerConfig, tmp_path: Path) -> None:
    keys = [config.key_file.read_bytes(), (config.data_dir / "tls/ca.key").read_bytes().splitlines()[1]]
    for passphrase in (None, PASSPHRASE):
        file = tmp_path / f"backup-{passphrase}"
        backup.make(config, file, passphrase=passphrase)
        with file.open("rb") as source:
            content = zstandard.ZstdDecompressor().stream_reader(source).read()
        assert b"run_sequence" in content  # the store is
        assert not any(key in content for key in keys)


def test_backup_without_keys_is_restored_where_they_are(config: ServerConfig, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    backup.make(config, file)
    there = elsewhere(config)
    error = refusal(there, file)
    assert error.code == "keys_missing"
    assert str(there.key_file) in error.message
    restore_file(config, file, replace=True)
    strange = elsewhere(config, "third")
    (strange.data_dir / "tls").mkdir(parents=True)
    strange.key_file.touch(0o600)
    strange.key_file.write_bytes(bytes(32))
    (strange.data_dir / "tls/ca.key").write_bytes((config.data_dir / "tls/ca.key").read_bytes())
    assert refusal(strange, file).code == "master_key_wrong"
    assert not strange.store_file.exists()
    (strange.data_dir / "tls/ca.pem").write_bytes(b"another")
    assert refusal(strange, file).code == "ca_wrong"


def test_damaged_or_cut_off_backup_is_refused_before_anything_is_touched(config: ServerConfig, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    backup.make(config, file)
    whole = file.read_bytes()
    (tmp_path / "whole").mkdir()
    expected = backup.unpack(io.BytesIO(whole), tmp_path / "whole")
    places = [0, len(whole) - 1, *random.Random(3).sample(range(len(whole)), 80)]
    spoiled = [bytes([*whole[:place], whole[place] ^ 0x10, *whole[place + 1 :]]) for place in places]
    spoiled += [whole[:length] for length in (0, 1, 100, len(whole) // 2)]
    refused = 0
    for number, content in enumerate(spoiled):
        directory = tmp_path / f"work-{number}"
        directory.mkdir()
        try:
            found = backup.unpack(io.BytesIO(content), directory)
        except InvalidInput as error:
            refused += error.code == "backup_damaged"
        else:  # a bit that the compression has no use for
            assert (found.manifest, found.ca_pem) == (expected.manifest, expected.ca_pem), number
            assert found.store.read_bytes() == expected.store.read_bytes()
    assert refused > len(spoiled) - 5
    before = config.store_file.read_bytes()
    file.write_bytes(spoiled[5])
    assert refusal(config, file, replace=True).code == "backup_damaged"
    assert config.store_file.read_bytes() == before
    assert not list(config.data_dir.glob("replaced-*"))


def test_something_else_is_no_backup(config: ServerConfig, tmp_path: Path) -> None:
    for content in (b"", b"hello", zstandard.compress(b"hello" * 1000)):
        file = tmp_path / "other"
        file.write_bytes(content)
        assert refusal(elsewhere(config), file).code == "backup_damaged"


def test_server_that_is_there_is_only_replaced_when_that_is_asked_for_and_nothing_is_deleted(
    config: ServerConfig, tmp_path: Path
) -> None:
    file = tmp_path / "backup"
    backup.make(config, file, passphrase=PASSPHRASE)
    former = config.store_file.read_bytes()
    assert refusal(config, file, passphrase=PASSPHRASE).code == "already_initialised"
    restore_file(config, file, passphrase=PASSPHRASE, replace=True)
    [aside] = config.data_dir.glob("replaced-*")
    assert (aside / "store.db").read_bytes() == former
    with pytest.raises(Conflict, match="exists already"):
        backup.make(config, file)


async def test_other_keys_that_stand_in_the_way_are_put_aside_too(config: ServerConfig, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    backup.make(config, file, passphrase=PASSPHRASE)
    there = elsewhere(config)
    await init(there)
    former = there.key_file.read_bytes()
    restore_file(there, file, passphrase=PASSPHRASE, replace=True)
    [aside] = there.data_dir.glob("replaced-*")
    assert (aside / "master.key").read_bytes() == former
    assert there.key_file.read_bytes() == config.key_file.read_bytes()


def test_passphrase_is_checked(config: ServerConfig, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    with pytest.raises(InvalidInput, match="at least 12"):
        backup.make(config, file, passphrase=b"short")
    assert not file.exists()
    backup.make(config, file, passphrase=PASSPHRASE)
    there = elsewhere(config)
    assert refusal(there, file).code == "passphrase_missing"
    assert refusal(there, file, passphrase=b"another passphrase").code == "passphrase_wrong"
    assert not there.store_file.exists()


def test_backup_of_a_newer_version_is_refused_with_what_to_do(config: ServerConfig, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(config.store_file)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    file = tmp_path / "backup"
    backup.make(config, file, passphrase=PASSPHRASE)
    there = elsewhere(config)
    error = refusal(there, file, passphrase=PASSPHRASE)
    assert error.code == "store_too_new"
    assert not there.store_file.exists()


def test_backup_of_a_newer_format_names_the_version_that_made_it(tmp_path: Path) -> None:
    text = json.dumps({"format": backup.FORMAT + 1, "version": "9.9"}).encode()
    with pytest.raises(InvalidInput, match=r"has format 2") as caught:
        backup._read_manifest(text)
    assert "9.9" in caught.value.hint


def test_damaged_store_gives_no_backup(config: ServerConfig, tmp_path: Path) -> None:
    size = config.store_file.stat().st_size
    with config.store_file.open("r+b") as file:
        for page in range(4096, size, 4096):
            file.seek(page)
            file.write(b"\xff" * 8)
    with pytest.raises(InvalidInput, match="is damaged, so there is no backup"):
        backup.make(config, tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_nothing_that_somebody_may_hold_is_numbered_again(config: ServerConfig, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    backup.make(config, file)
    db = SqliteDatabase(config.store_file)
    before = db.write_now(Commit.SERVER_START, numbers)
    db.close()
    restore_file(config, file, replace=True)
    db = SqliteDatabase(config.store_file)
    after = db.write_now(Commit.SERVER_START, numbers)
    db.close()
    assert before["session"] == ("s2", 2)
    assert after["session"] == ("", 2 + restored.NUMBERS_STEP)
    for name in ("run", "event"):
        assert after[name] > before[name] + restored.NUMBERS_STEP - 10  # type: ignore[operator]
    for name in ("object", "env set"):
        assert after[name] == before[name] + restored.VERSIONS_STEP  # type: ignore[operator]


def numbers(connection: Connection) -> dict[str, object]:
    """What the next of each would get, and is rolled back by nobody: the store is thrown away."""
    run = runs.accept(connection, new_run(f"n{events.last_number(connection)}"))
    events.add(connection, "run.accepted", run.run_id)
    return {
        "session": nodes.current_session(connection, "n1"),
        "run": run.sequence,
        "event": events.last_number(connection),
        "object": objects.get(connection, ARENA).version,
        "env set": envs.get(connection, "builds").version,
    }


async def test_only_what_somebody_removed_counts_as_removed_and_after_a_restore_nothing_of_before(
    config: ServerConfig,
) -> None:
    db = SqliteDatabase(config.store_file)

    def remove(connection: Connection) -> None:
        objects.remove(connection, ARENA)
        audit.add(connection, Caller("operator", "a", "admin", b""), "delete", "objects", objects.spoken(ARENA))

    async def removed(ref: types_pb2.ObjectRef = ARENA) -> bool:
        return await db.read(lambda connection: objects.was_removed(connection, ref))

    assert not await removed()
    assert not await removed(types_pb2.ObjectRef(kind="game", name="never-heard-of"))
    await db.write(Commit.SERVER_START, remove)
    assert await removed()
    made = lambda c: objects.put(c, ARENA, {}, replace=False, expected_version=None)  # noqa: E731
    await db.write(Commit.SERVER_START, made)
    assert not await removed()
    await db.write(Commit.SERVER_START, remove)
    assert await removed()
    # It may have been made again after the backup, and its saves are worth more than the room.
    await db.write(Commit.STORE_RESTORED, lambda c: restored.make_safe(c, datetime.now(UTC)))
    assert not await removed()
    await db.write(Commit.SERVER_START, made)
    await db.write(Commit.SERVER_START, remove)
    assert await removed()
    db.close()


async def test_run_that_waits_in_a_backup_older_than_nodes_remember_becomes_unknown(config: ServerConfig) -> None:
    for age, state in ((timedelta(days=1), runs.QUEUED), (timedelta(days=8), runs.UNKNOWN)):
        db = SqliteDatabase(config.store_file)
        made_at = datetime.now(UTC) - age
        unknown = await db.write(Commit.STORE_RESTORED, lambda c, made_at=made_at: restored.make_safe(c, made_at))  # type: ignore[misc]
        run = await db.read(lambda c: runs.get(c, "r1"))
        assert run.state == state
        assert unknown == (["r1"] if state == runs.UNKNOWN else [])
        db.close()
    assert run.failure.code == "backup_too_old"
