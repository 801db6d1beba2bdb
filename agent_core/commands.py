"""Commands of the server: acknowledged, carried out once, answered.

A command is known by its id and the digest of its body. What changes something is journalled before it is
acknowledged; the same command again gets the same answer and does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from agent_core.remote import RemoteContainers
from agent_core.runner import RunEngine
from agent_core.services import Background
from agent_core.state import Cancellation, CommandRecord, State
from agent_core.transitions import Transition
from outrider.errors import Conflict, InvalidInput, OperationTimeout, OutriderError
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import node_service_pb2_grpc as pb_grpc
from outrider.wire import failure_of, seconds

log = structlog.get_logger(__name__)

_READS = ("list_containers", "inspect_container")
_STREAMS = ("stream_container_logs", "stop_stream")


class Commands:
    """Hands each command to the part of the agent that it is for."""

    def __init__(
        self,
        state: State,
        runs: RunEngine,
        containers: RemoteContainers,
        background: Background,
        *,
        cancel_grace_s: float,
        send_result: Callable[[pb.CommandResult], None],
        stub: Callable[[], pb_grpc.NodeServiceAsyncStub | None],
        age_s: Callable[[pb.Command], float],
    ) -> None:
        self._state = state
        self._runs = runs
        self._containers = containers
        self._background = background
        self._cancel_grace_s = cancel_grace_s
        self._send_result = send_result
        self._stub = stub
        self._age_s = age_s
        self._in_hand: set[str] = set()

    async def handle(self, command: pb.Command) -> pb.CommandAck:
        """Take ``command`` on and acknowledge it; what takes long goes on afterwards."""
        ack = pb.CommandAck(command_id=command.command_id)
        kind = command.WhichOneof("body")
        try:
            if kind in _READS:
                self._background.start(self._answer(command), f"command {kind}")
            elif kind in _STREAMS:
                self._stream(command)
            else:
                ack.duplicate = await self._once(command, str(kind))
        except OutriderError as error:
            log.warning("command refused", command=command.command_id, kind=kind, error=str(error))
            ack.refused.CopyFrom(failure_of(error))
        return ack

    async def _once(self, command: pb.Command, kind: str) -> bool:
        """Carry out what changes something; whether it had been received before."""
        known = await self._state.command(command.command_id)
        if known is not None:
            if known.digest != command.digest:
                if kind == "run_pipeline" and self._state.find(command.run_pipeline.run_id) is not None:
                    # A server of another version may write the same command in another way. Which run it is says the
                    # lease, and another one is refused there.
                    await self._runs.accept(command.run_pipeline, command_id=command.command_id, digest=command.digest)
                    return True
                raise Conflict(
                    f"command {command.command_id} was received before with another content", code="digest_mismatch"
                )
            if known.result is not None:
                self._send_result(known.result)
            elif kind == "container" and command.command_id not in self._in_hand:
                self._refuse_late(command)
                self._act(command, known)  # the agent was killed in the middle of it
            return True
        match kind:
            case "run_pipeline":
                await self._runs.accept(command.run_pipeline, command_id=command.command_id, digest=command.digest)
            case "cancel_run":
                cancel = command.cancel_run
                await self._runs.cancel(
                    cancel.run_id,
                    Cancellation.of(cancel, default_grace_s=self._cancel_grace_s),
                    command_id=command.command_id,
                    digest=command.digest,
                )
            case "container":
                self._refuse_late(command)
                received = self._state.command_received(command.command_id, command.digest)
                await self._state.commit(Transition.COMMAND_RECEIVED, received)
                self._act(command)
            case _:
                raise InvalidInput(f"this agent does not know the command {kind!r}", code="unknown_command")
        return False

    def _refuse_late(self, command: pb.Command) -> None:
        """A link that was silent, or an agent that was stopped, may have held it up. Its caller was told by now that
        it took too long, and may have done something else."""
        limit_s, age_s = seconds(command.deadline), self._age_s(command)
        if 0 < limit_s < age_s:
            raise OperationTimeout(
                f"the command came {age_s:.0f} s after it was sent, when nobody waited for it any more",
                code="command_late",
                hint="nothing was done; ask again",
            )

    def _act(self, command: pb.Command, known: CommandRecord | None = None) -> None:
        self._in_hand.add(command.command_id)
        self._background.start(self._answer(command, known), "command container")

    async def _answer(self, command: pb.Command, known: CommandRecord | None = None) -> None:
        async def restarting(former: str) -> None:
            change = self._state.restart_intended(command.command_id, former)
            await self._state.commit(Transition.RESTART_INTENDED, change)

        former = known.former if known is not None else None
        result = await self._containers.carry_out(
            command, again=known is not None, former=former, restarting=restarting
        )
        if command.command_id in self._in_hand:
            await self._state.commit(Transition.COMMAND_ANSWERED, self._state.command_answered(result))
            self._in_hand.discard(command.command_id)
        self._send_result(result)

    def _stream(self, command: pb.Command) -> None:
        if command.WhichOneof("body") == "stop_stream":
            self._containers.stop_stream(command.stop_stream.stream_id)
            return
        stub = self._stub()
        if stub is not None:
            self._containers.open_log(stub, command.stream_container_logs)
