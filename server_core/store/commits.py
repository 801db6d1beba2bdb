"""Every commit that the server makes, by name: what its failpoints are called, and what tests enumerate.

`store.<name>.before` is reached when all work of the transaction is done and nothing of it is durable,
`store.<name>.after` when it is durable and nobody has been told. tests/faults kills the server at both, for each.
"""

from __future__ import annotations

from enum import StrEnum


class Commit(StrEnum):
    """What a transaction is for. A new one needs a scenario in tests/faults/test_server_commits.py."""

    SCHEMA_UPGRADE = "schema_upgrade"
    SERVER_INIT = "server_init"
    SERVER_START = "server_start"
    # What operators ask for; the answer is kept in the same transaction.
    NODE_ADD = "node_add"
    NODE_REMOVE = "node_remove"
    NODE_ASSIGN = "node_assign"
    NODE_ROLE_SET = "node_role_set"
    NODE_ROLE_REMOVE = "node_role_remove"
    OBJECT_SET = "object_set"
    OBJECT_REMOVE = "object_remove"
    ENV_SET = "env_set"
    ENV_REMOVE = "env_remove"
    RUN_ACCEPT = "run_accept"
    RUN_CANCEL = "run_cancel"
    RUN_RESOLVE = "run_resolve"
    RUN_RETRY = "run_retry"
    NODE_DRAIN = "node_drain"
    CONTAINER_ANSWER = "container_answer"
    # What is sent to nodes, and what they say.
    SESSION_BEGIN = "session_begin"
    NODES_SEEN = "nodes_seen"
    NODE_PRESENCE = "node_presence"
    RUN_WAITS = "run_waits"
    RUN_SENT = "run_sent"
    RUN_ACKNOWLEDGED = "run_acknowledged"
    RUN_REPORT = "run_report"
    RUN_SETTLED = "run_settled"
    RECONCILED = "reconciled"
    WRITE_BACK = "write_back"
    NODE_DRAINED = "node_drained"
    DRAIN_DEADLINE = "drain_deadline"
    LOGS = "logs"
    EVENTS = "events"
    # Now and then.
    REQUESTS_FORGOTTEN = "requests_forgotten"
    EVENTS_RETIRED = "events_retired"
    LOGS_RETIRED = "logs_retired"
    STORE_RESTORED = "store_restored"

    @property
    def before(self) -> str:
        """The failpoint ahead of the commit."""
        return f"store.{self.value}.before"

    @property
    def after(self) -> str:
        """The failpoint behind the commit."""
        return f"store.{self.value}.after"

    @property
    def needs_room(self) -> bool:
        """Whether it brings in something new, and is refused where the reserve of free disk is touched.

        What ends or records what is under way is taken as long as there is any disk at all.
        """
        return self in _NEEDS_ROOM


_NEEDS_ROOM = frozenset(
    {
        Commit.RUN_ACCEPT,
        Commit.NODE_ADD,
        Commit.NODE_ROLE_SET,
        Commit.OBJECT_SET,
        Commit.ENV_SET,
        Commit.LOGS,
        Commit.EVENTS,
    }
)
