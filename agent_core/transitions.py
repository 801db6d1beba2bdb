"""Every write that the agent's journal knows, by name: the one list of what a crash can fall between.

Whoever writes says which transition it is, so that there is no write without a name. Around the commit of each
stand two failpoints, ``journal.<transition>.before`` (nothing of it is on the disk) and
``journal.<transition>.after`` (all of it is, and nobody has been told yet); `tests/faults` kills an agent at all of
them, and a transition that no fault test reaches fails the suite.
"""

from __future__ import annotations

from enum import Enum


class Transition(Enum):
    """The name of a write. What it makes true is said beside it."""

    # Commands and runs.
    RUN_ACCEPTED = "run_accepted"  # command received, run and steps taken on: from here it is never lost
    RUN_CANCELLED = "run_cancelled"  # a cancellation, durable
    RUN_FINISHED = "run_finished"  # terminal, its write-back and its last report on their way
    RUN_GIVEN_UP = "run_given_up"  # the agent failed at it itself: unknown
    RUN_RETOLD = "run_retold"  # the end of runs, reported once more because the server asked
    COMMAND_RECEIVED = "command_received"
    RESTART_INTENDED = "restart_intended"  # a container is about to be restarted from afar, and since when it has run
    COMMAND_ANSWERED = "command_answered"
    FORGOTTEN = "forgotten"  # what nobody needs any more is dropped: runs, commands
    SESSION_KEPT = "session_kept"  # the session to offer when the link is down

    # Steps and attempts.
    STEP_WAITING = "step_waiting"  # ready to start, and for what it waits; or not any more
    STEP_ENDED = "step_ended"  # terminal without an attempt of its own: skipped, cancelled, refused
    ATTEMPT_INTENDED = "attempt_intended"  # plan and name of the container about to be made
    ATTEMPT_CREATED = "attempt_created"  # the container is there; from here on it may have been started
    ATTEMPT_FENCED = "attempt_fenced"  # that container surely never ran and is about to be removed: back to intended
    ATTEMPT_STARTED = "attempt_started"
    ATTEMPT_EXITED = "attempt_exited"  # how its container ended
    ATTEMPT_RETRIED = "attempt_retried"  # its end, log drained, outputs read; the step is tried again
    ATTEMPT_SETTLED = "attempt_settled"  # its end, log drained, outputs read, and with it the step's
    TIME_SPENT = "time_spent"  # how much of their time the open attempts have used up, in case the machine reboots

    # Outbox and logs.
    EVENT_NOTED = "event_noted"
    OUTBOX_ACKNOWLEDGED = "outbox_acknowledged"  # the server has these reports
    EVENTS_ACKNOWLEDGED = "events_acknowledged"
    LOG_OPENED = "log_opened"
    LOG_ACKNOWLEDGED = "log_acknowledged"  # the server has all of it

    # What the node has given out.
    VOLUME_ALLOTTED = "volume_allotted"  # before its directory is made
    VOLUME_USED = "volume_used"  # by a managed container
    VOLUME_UNUSED = "volume_unused"
    VOLUME_RELEASED = "volume_released"  # to be removed as soon as nobody uses it
    VOLUME_REMOVED = "volume_removed"
    IDENTITY_ALLOTTED = "identity_allotted"
    IDENTITY_RELEASED = "identity_released"
    PORTS_LEASED = "ports_leased"
    PORTS_RELEASED = "ports_released"
    PORTS_FREED = "ports_freed"  # the kernel has let go of them
    NETWORK_LEASED = "network_leased"
    NETWORK_RETURNED = "network_returned"  # pause containers that are gone
    MANAGED_STARTING = "managed_starting"  # a managed container is about to be made
    MANAGED_READY = "managed_ready"
    MANAGED_REPLACING = "managed_replacing"  # the former one is about to be stopped and set aside
    MANAGED_BROUGHT_BACK = "managed_brought_back"  # the one that was to replace it did not get ready
    MANAGED_SWITCHING = "managed_switching"  # the one beside it is ready: from here on it takes the former one's place
    MANAGED_SWITCHED = "managed_switched"
    MANAGED_RESTARTING = "managed_restarting"  # it does not work any more, and is about to be restarted or given up
    MANAGED_LOG_SEEN = "managed_log_seen"  # how far its log was read for its liveness
    MANAGED_REMOVED = "managed_removed"
    EXEC_INTENDED = "exec_intended"  # a program is about to be run inside a managed container
    EXEC_FORGOTTEN = "exec_forgotten"

    # The journal itself.
    DAMAGE_NOTED = "damage_noted"  # this journal took the place of one that was lost, and is to be rebuilt
    REBUILT = "rebuilt"  # what could be found out of what the lost one held

    def __init__(self, name: str) -> None:
        self.before = f"journal.{name}.before"
        self.after = f"journal.{name}.after"
