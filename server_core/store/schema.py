"""The tables, as they are now. Times are integer microseconds since 1970; ``*_json`` columns hold JSON text.

A change here needs a migration beside it in migrations/versions; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

meta = Table(
    "meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", Text, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("hash", LargeBinary, primary_key=True),  # SHA-256 of the token
    Column("kind", String, nullable=False),  # "operator" or "node"
    Column("name", String, nullable=False),  # the operator's, or the node's id
    Column("role", String, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("node_id", String, primary_key=True),
    Column("labels_json", Text, nullable=False),  # the operator's and the agent's
    Column("role", String, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("session_id", String, nullable=False),
    Column("agent_version", String, nullable=False),
    Column("facts_json", Text, nullable=False),
    Column("described", LargeBinary, nullable=False),  # a Node message: step types and plugins
    Column("address", String, nullable=False),
    Column("last_seen", BigInteger),
    Column("brief", LargeBinary),  # a BriefState message
    Column("created_at", BigInteger, nullable=False),
    Column("drain_json", Text),  # see server_core.store.draining; NULL: it takes runs
    Column("environment", LargeBinary),  # an Environment message; NULL: its agent has no launcher
)

node_roles = Table(
    "node_roles",
    metadata,
    Column("name", String, primary_key=True),
    Column("spec_json", Text, nullable=False),  # outrider.roles.Role
    Column("lock", Text, nullable=False),  # a requirements file with hashes
    Column("lock_sha256", LargeBinary, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)

objects = Table(
    "objects",
    metadata,
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("attributes_json", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("status_version", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("kind", "name"),
)

object_status = Table(
    "object_status",
    metadata,
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("attribute", String, nullable=False),
    Column("value_json", Text, nullable=False),
    Column("run_id", String, nullable=False),
    Column("run_sequence", BigInteger, nullable=False),
    Column("written_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("kind", "name", "attribute"),
)

data_keys = Table(
    "data_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),  # under the master key
    Column("created_at", BigInteger, nullable=False),
)

env_sets = Table(
    "env_sets",
    metadata,
    Column("name", String, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)

env_values = Table(
    "env_values",
    metadata,
    Column("set_name", String, nullable=False),
    Column("name", String, nullable=False),
    Column("sealed", LargeBinary, nullable=False),  # under the data key
    PrimaryKeyConstraint("set_name", "name"),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String, primary_key=True),
    Column("sequence", BigInteger, nullable=False, unique=True),
    Column("caller", String, nullable=False),
    Column("key", String, nullable=False),
    Column("request_digest", LargeBinary, nullable=False),
    Column("pipeline", String, nullable=False),
    Column("pipeline_yaml", LargeBinary, nullable=False),
    Column("pipeline_sha256", LargeBinary, nullable=False),
    Column("node_id", String, nullable=False),
    Column("object_kind", String, nullable=False),  # "" where there is no object
    Column("object_name", String, nullable=False),
    Column("object", LargeBinary),  # an Object message: as it was when the run was accepted
    Column("args_json", Text, nullable=False),
    Column("env_names_json", Text, nullable=False),
    Column("timeout_us", BigInteger, nullable=False),
    Column("lease_id", String, nullable=False),
    Column("state", Integer, nullable=False),  # a RunState
    Column("failure", LargeBinary),  # a Failure message
    Column("reason", Text, nullable=False),
    Column("writeback_json", Text, nullable=False),
    Column("sent", Boolean, nullable=False),  # set before it is sent: the node may have it
    Column("cancel_requested", Boolean, nullable=False),
    Column("cancel_reason", Text, nullable=False),
    Column("cancel_grace_us", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("retry_of", String),  # the run that this one goes on from
    Column("finished_steps", LargeBinary),  # a RunPipeline message with nothing but the steps taken over from it
    Column("outbox_id", String),  # of the last report that was recorded, and its number there
    Column("outbox_sequence", BigInteger),
    UniqueConstraint("caller", "key"),
    Index(None, "node_id", "state"),
    Index(None, "object_kind", "object_name", "sequence"),
    Index(None, "retry_of"),
)

steps = Table(
    "steps",
    metadata,
    Column("run_id", String, nullable=False),
    Column("position", Integer, nullable=False),
    Column("name", String, nullable=False),
    Column("state", Integer, nullable=False),  # a StepState
    Column("attempt", Integer, nullable=False),
    Column("status", LargeBinary, nullable=False),  # a StepStatus message
    PrimaryKeyConstraint("run_id", "name"),
)

run_logs = Table(
    "run_logs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("run_id", String, nullable=False),
    Column("step", String, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("stream", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("end", BigInteger, nullable=False),  # offset of what follows
    Column("gap", BigInteger, nullable=False),  # > 0: so many bytes are missing; -1: nobody knows how many
    Column("zstd", Boolean, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("time", BigInteger),
    Index(None, "run_id", "step", "attempt", "stream", "end"),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("node_id", String, nullable=False),  # "" for the server's own
    Column("node_sequence", BigInteger, nullable=False),
    Column("type", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("time", BigInteger, nullable=False),
    Column("data_json", Text, nullable=False),
    # A node that lost its journal numbers from 1 again; the time tells its events from the former ones.
    Index(
        "uq_events_node",
        "node_id",
        "node_sequence",
        "time",
        unique=True,
        sqlite_where=text("node_sequence > 0"),
        postgresql_where=text("node_sequence > 0"),
    ),
    sqlite_autoincrement=True,
)

requests = Table(
    "requests",
    metadata,
    Column("caller", String, nullable=False),
    Column("request_id", String, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("sealed", LargeBinary, nullable=False),  # the answer; it may hold a token that is shown once
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("caller", "request_id"),
)

audit = Table(
    "audit",
    metadata,
    # From 1, without a hole; the last one also stands in `meta`, so that rows missing at the end are noticed.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("time", BigInteger, nullable=False),
    Column("actor", String, nullable=False),
    Column("verb", String, nullable=False),
    Column("resource", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("reason", Text, nullable=False),
    Column("data_json", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),  # SHA-256 over the hash before it and this row
    Index(None, "subject"),
)
