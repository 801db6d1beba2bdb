"""Tokens: 256 random bits, kept only as their SHA-256.

A plain hash is enough where the secret can't be guessed; salting and stretching are for passwords. The hash
of a node's token is also the key of its heartbeat proofs (see HeartbeatRequest.proof).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

OPERATOR_PREFIX = "oro_"
NODE_PREFIX = "orn_"
"""Prefixes, so that people and secret scanners can tell a token when they see one."""


def mint(prefix: str) -> str:
    """A new token."""
    return prefix + secrets.token_urlsafe(32)


def digest(token: str) -> bytes:
    """What is stored of ``token``."""
    return hashlib.sha256(token.encode()).digest()


def heartbeat_proof(token_digest: bytes, session_id: str, epoch: int, sequence: int) -> bytes:
    """The proof that a heartbeat must carry."""
    return hmac.new(token_digest, f"{session_id}\n{epoch}\n{sequence}".encode("ascii"), hashlib.sha256).digest()


def proof_is_right(proof: bytes, token_digest: bytes, session_id: str, epoch: int, sequence: int) -> bool:
    return hmac.compare_digest(proof, heartbeat_proof(token_digest, session_id, epoch, sequence))
