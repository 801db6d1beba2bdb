"""Pipelines and runs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from sqlalchemy import Connection

from outrider import wire
from outrider.errors import Conflict, InvalidInput, Problem
from outrider.pipeline import Pipeline, env_references
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2
from server_core import checks, dispatch, editor_schema, roles
from server_core.access import current_caller
from server_core.bus.base import EVENTS, run_topic
from server_core.control.common import Context, Part, check_ref, request_digest
from server_core.store import audit, draining, events, nodes, objects, runs, settling
from server_core.store.commits import Commit

_MAX_LISTED = 1000
_MAX_TIMEOUT_S = 30 * 24 * 3600.0


class Runs(Part):
    async def ValidatePipeline(
        self, request: pb.ValidatePipelineRequest, context: Context
    ) -> pb.ValidatePipelineResponse:
        """Everything that is wrong, as an answer rather than as an error."""
        try:
            pipeline = await asyncio.to_thread(checks.load, request.pipeline_yaml, b"")
            given = wire.load_json_object(request.args_json, "args")
            ref = check_ref(request.object) if request.HasField("object") else None
            found, _ = await self._problems(pipeline, request.node_id, ref, given)
        except InvalidInput as error:
            found = list(error.problems) or [Problem(error.message, hint=error.hint)]
        return pb.ValidatePipelineResponse(problems=[wire.problem_to_proto(problem) for problem in found])

    async def GetPipelineSchema(self, request: pb.GetPipelineSchemaRequest, context: Context) -> pb.PipelineSchema:
        found, env_sets = await self._s.db.read(lambda c: editor_schema.offers(c, request.node_id, request.role))
        schema = await asyncio.to_thread(editor_schema.build, found, env_sets)
        count = sum(len(offer.node_ids) for offer in found)
        return pb.PipelineSchema(schema_json=wire.dump_json(schema), nodes=count)

    async def ExecutePipeline(self, request: pb.ExecutePipelineRequest, context: Context) -> types_pb2.Run:
        """Check everything that can be known, store the run, and answer; its node is told after that."""
        caller = current_caller().key
        key = request.key or request.request_id
        digest = _digest(request)
        earlier = await self._s.db.read(lambda c: runs.by_key(c, caller, key, digest))
        if earlier is not None:
            self._s.dispatcher.kick_soon(earlier.node_id)  # its caller may have been told that it failed
            return earlier
        given = wire.load_json_object(request.args_json, "args")
        ref = check_ref(request.object) if request.HasField("object") else None
        timeout_s = wire.seconds(request.timeout)
        if not 0 <= timeout_s <= _MAX_TIMEOUT_S:
            raise InvalidInput(f"a timeout of {timeout_s:g} s is not between 0 and 30 days", code="bad_timeout")
        node = await self._s.db.read(lambda c: nodes.get(c, request.node_id))
        never_came = not node.epoch
        pipeline = await asyncio.to_thread(checks.load, request.pipeline_yaml, request.pipeline_sha256)
        # Of a node that never registered nobody knows the step types; all else can be checked.
        problems, args = await self._problems(pipeline, "" if never_came else request.node_id, ref, given)
        if ref is None:
            problems += checks.without_object(pipeline)
        checks.refuse(f"pipeline {pipeline.name} can't run", problems)
        if never_came or not (request.allow_offline or self._s.fleet.is_online(node.node_id)):
            raise self._s.fleet.offline_error(node.node_id)
        run_id = new_run_id()

        def accept(connection: Connection) -> types_pb2.Run:
            again = runs.by_key(connection, caller, key, digest)
            if again is not None:
                return again
            nodes.get(connection, request.node_id)
            draining.refuse(connection, request.node_id)
            found = None if ref is None else objects.get(connection, ref)
            if ref is not None and request.refuse_if_busy:
                self._refuse_busy(connection, ref)
            made = runs.accept(
                connection,
                runs.NewRun(
                    run_id=run_id,
                    lease_id=settling.new_lease(),
                    caller=caller,
                    key=key,
                    request_digest=digest,
                    pipeline=pipeline.name,
                    pipeline_yaml=request.pipeline_yaml,
                    pipeline_sha256=hashlib.sha256(request.pipeline_yaml).digest(),
                    node_id=request.node_id,
                    object=found,
                    args=args,
                    env_names=env_references(pipeline),
                    timeout_us=round(timeout_s * 1e6),
                    steps=checks.first_statuses(pipeline),
                ),
            )
            events.add(connection, "run.accepted", run_id, node_id=request.node_id, data={"pipeline": pipeline.name})
            return made

        run = await self._s.db.write(Commit.RUN_ACCEPT, accept)
        self._s.bus.publish(EVENTS)
        self._s.dispatcher.kick_soon(request.node_id)
        return run

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        limit = min(request.limit, _MAX_LISTED) if request.limit > 0 else 100

        def read(connection: Connection) -> list[types_pb2.Run]:
            listed = runs.listed(
                connection, node_id=request.node_id, ref=request.object, states=request.states, limit=limit
            )
            if not listed and request.node_id:
                nodes.get(connection, request.node_id)  # runs outlive their node: only here can it be a wrong name
            return listed

        found = await self._s.db.read(read)
        return pb.ListRunsResponse(runs=[self._shown(run) for run in found])

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> types_pb2.Run:
        return self._shown(await self._s.db.read(lambda c: runs.get(c, request.run_id)))

    async def CancelRun(self, request: pb.CancelRunRequest, context: Context) -> types_pb2.Run:
        """Durable: the node is told as soon as it is there. A run that is over is answered as it is."""
        grace_us = round(wire.seconds(request.grace) * 1e6)
        if not 0 <= grace_us <= 3_600_000_000:
            raise InvalidInput("the grace of a cancellation is between 0 and 1 hour", code="bad_grace")
        settled: list[types_pb2.ObjectRef | None] = []
        caller = current_caller()

        def work(connection: Connection) -> types_pb2.Run:
            run = runs.get(connection, request.run_id)
            if runs.request_cancel(connection, run.run_id, request.reason[:512], grace_us):
                data = {"reason": request.reason[:512], "by": caller.name}
                events.add(connection, "run.cancel_requested", run.run_id, node_id=run.node_id, data=data)
                audit.add(connection, caller, "cancel", "runs", run.run_id, reason=request.reason)
                run = runs.get(connection, run.run_id)
                if runs.is_over(run.state):
                    settled.append(dispatch.finished(connection, run.run_id))
            return run

        run = await self._once("CancelRun", Commit.RUN_CANCEL, request, types_pb2.Run, work)
        for ref in settled:
            self._s.dispatcher.settled(run.run_id, ref)
        self._s.bus.publish(run_topic(run.run_id))
        self._s.bus.publish(EVENTS)
        self._s.dispatcher.kick_soon(run.node_id)
        return self._shown(run)

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[types_pb2.Run]:
        """The run as it is, then again after every change, until it is over."""
        run_id = (await self._s.db.read(lambda c: runs.get(c, request.run_id))).run_id
        last: types_pb2.Run | None = None
        with self._s.bus.subscribe(run_topic(run_id)) as subscription:
            while True:
                run = self._shown(await self._s.db.read(lambda c: runs.get(c, run_id)))
                if run != last:
                    yield run
                    last = run
                if runs.is_over(run.state):
                    return
                await subscription.wait()

    @staticmethod
    def _refuse_busy(connection: Connection, ref: types_pb2.ObjectRef) -> None:
        active = runs.active_of(connection, ref)
        if active:
            raise Conflict(
                f"object {objects.spoken(ref)} is busy with run {active[0].run_id}",
                code="object_busy",
                hint="wait for it, or let this run queue behind it",
            )

    async def _problems(
        self, pipeline: Pipeline, node_id: str, ref: types_pb2.ObjectRef | None, given: Mapping[str, Any]
    ) -> tuple[list[Problem], dict[str, Any]]:
        def read(
            connection: Connection,
        ) -> tuple[types_pb2.Node | None, types_pb2.Object | None, dict[str, str], dict[str, list[str] | None], str]:
            node = nodes.get(connection, node_id) if node_id else None
            found = None if ref is None else objects.get(connection, ref)
            uses = [step.uses for step in pipeline.steps]
            missing = {} if node is None else roles.why_missing(connection, node, uses)
            return node, found, missing, *checks.known_envs(connection, pipeline)

        node, found, missing, known, hint = await self._s.db.read(read)
        attributes = None if found is None else json.loads(found.attributes_json)
        return await asyncio.to_thread(checks.problems_of, pipeline, node, known, hint, given, attributes, missing)

    def _shown(self, run: types_pb2.Run) -> types_pb2.Run:
        """The run with the latest progress, and with why it still waits where that is known by presence."""
        progress = self._s.dispatcher.progress.get(run.run_id)
        if progress:
            for step in run.steps:
                if step.name in progress and step.state == types_pb2.STEP_STATE_RUNNING:
                    step.progress.CopyFrom(progress[step.name])
        if run.state == runs.QUEUED and not run.reason and not self._s.fleet.is_online(run.node_id):
            run.reason = self._s.fleet.offline_error(run.node_id).message
        return run


def new_run_id() -> str:
    """ "r" and 20 characters of base 32 (RFC 4648's "extended hex", which sorts as its bytes do), ordered by time."""
    milliseconds = time.time_ns() // 1_000_000
    # 100 bits: 48 of time, 52 of chance; base 32 packs 5 in a character, so 12 bytes and 4 bits.
    number = (milliseconds << 52 | secrets.randbits(52)) << 4
    return "r" + base64.b32hexencode(number.to_bytes(13, "big")).decode().lower()[:20]


def _digest(request: pb.ExecutePipelineRequest) -> bytes:
    """What tells one request from another under the same key: everything but the request id and the key."""
    request_digest("ExecutePipeline", request)
    bare = pb.ExecutePipelineRequest()
    bare.CopyFrom(request)
    bare.ClearField("request_id")
    bare.ClearField("key")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()
