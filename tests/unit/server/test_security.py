"""Keys, sealed values, certificates, ids."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from outrider.errors import InvalidInput, PermanentError
from server_core import access
from server_core.control.runs import new_run_id
from server_core.security import certs, tokens
from server_core.security.vault import Vault, env_purpose


def test_sealed_value_opens_for_its_purpose_alone() -> None:
    vault = Vault(os.urandom(32))
    sealed = vault.seal(b"hunter2", env_purpose("s3", "KEY"))
    assert b"hunter2" not in sealed
    assert vault.seal(b"hunter2", env_purpose("s3", "KEY")) != sealed
    assert vault.open(sealed, env_purpose("s3", "KEY")) == b"hunter2"
    for wrong in (sealed[:-1] + bytes([sealed[-1] ^ 1]), sealed[:5], b"", b"\x02" + sealed[1:]):
        with pytest.raises(PermanentError):
            vault.open(wrong, env_purpose("s3", "KEY"))
    with pytest.raises(PermanentError, match=r"s3\.OTHER"):
        vault.open(sealed, env_purpose("s3", "OTHER"))
    with pytest.raises(PermanentError):
        Vault(os.urandom(32)).open(sealed, env_purpose("s3", "KEY"))


def test_heartbeat_proof_is_for_one_sequence_of_one_session() -> None:
    digest = tokens.digest("orn_x")
    proof = tokens.heartbeat_proof(digest, "s1", 3, 7)
    assert tokens.proof_is_right(proof, digest, "s1", 3, 7)
    for other in (("s1", 3, 8), ("s1", 4, 7), ("s2", 3, 7)):
        assert not tokens.proof_is_right(proof, digest, *other)


def test_certificate_is_kept_while_good_and_renewed_under_the_same_ca(tmp_path: Path) -> None:
    first = certs.ensure(tmp_path, ["games.example", "10.1.2.3"])
    ca = (tmp_path / "ca.pem").read_bytes()
    assert certs.ensure(tmp_path, ["games.example"]) == first
    assert certs.ensure(tmp_path, ["other.example"]) != first
    second = certs.ensure(tmp_path, [])
    late = certs.ensure(tmp_path, [], now=datetime.now(UTC) + certs.CERT_LIFE - timedelta(days=30))
    assert late != second
    assert (tmp_path / "ca.pem").read_bytes() == ca
    (tmp_path / "server.key").write_bytes(b"damaged")
    repaired = certs.ensure(tmp_path, [])
    x509.load_pem_x509_certificate(repaired.chain).verify_directly_issued_by(x509.load_pem_x509_certificate(ca))


def test_certificate_of_ones_own_must_fit_its_key(tmp_path: Path) -> None:
    certs.ensure(tmp_path / "a", [])
    certs.ensure(tmp_path / "b", [])
    assert certs.read(tmp_path / "a/server.pem", tmp_path / "a/server.key").chain
    for cert, key, part in (
        ("a/server.pem", "b/server.key", "is not that of"),
        ("a/server.key", "a/server.key", "PEM certificate"),
        ("nowhere.pem", "a/server.key", "nowhere.pem can't be read"),
    ):
        with pytest.raises(InvalidInput, match=part):
            certs.read(tmp_path / cert, tmp_path / key)


def test_run_ids_are_ordered_by_time_and_have_no_twin() -> None:
    ids = []
    for _ in range(20):
        ids.append(new_run_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert len({new_run_id() for _ in range(10_000)}) == 10_000
    assert all(len(run_id) == 21 and run_id.isalnum() and run_id.islower() for run_id in ids)


def test_viewer_reads_and_changes_nothing() -> None:
    allowed = {name for name, rule in access.CONTROL.items() if access.allows("viewer", rule)}
    assert "GetRun" in allowed
    assert "ListNodes" in allowed
    assert not {name for name in allowed if name.startswith(("Add", "Remove", "Set", "Execute", "Cancel", "Stop"))}
    assert all(access.allows("admin", rule) for rule in access.CONTROL.values())
    assert not any(access.allows("nobody", rule) for rule in access.CONTROL.values())
