"""What can happen, as words with plain arguments: what a machine draws, and what a recorded history replays.

A word that does not apply at the moment does nothing, so that an old history still makes sense to a newer program.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from outrider.v1 import types_pb2 as types
from tests.model.judge import OVER
from tests.model.pipelines import BY_NAME
from tests.model.world import World

Step = tuple[str, list[Any]]


class Driver:
    """Acts on a world and keeps what was done."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.done: list[Step] = []

    def act(self, word: str, *arguments: Any) -> None:
        """Let ``word`` happen."""
        self.done.append((word, list(arguments)))
        getattr(self, f"_{word}")(*arguments)

    def replay(self, steps: Sequence[Step]) -> None:
        for word, arguments in steps:
            self.act(word, *arguments)

    def told(self) -> str:
        """The history, for tests/model/histories."""
        return json.dumps(self.done)

    # -- operators

    def _submit(self, pipeline: str, object_name: str) -> None:
        self.world.submit(BY_NAME[pipeline], object_name)

    def _submit_again(self, index: int, times: int) -> None:
        if first := [each for each in self.world.submitted if not each.retry_of]:
            self.world.submit_again(first[index % len(first)], times)

    def _cancel(self, index: int) -> None:
        active = [each for each in self.world.submitted if each.run_id and (each.states or [0])[-1] not in OVER]
        if active:
            self.world.cancel(active[index % len(active)])

    def _resolve(self, index: int, verdict: int) -> None:
        unknown = [each for each in self.world.submitted if (each.states or [0])[-1] == types.RUN_STATE_UNKNOWN]
        if unknown:
            self.world.resolve(unknown[index % len(unknown)], verdict)

    def _retry(self, index: int) -> None:
        over = [each for each in self.world.submitted if (each.states or [0])[-1] in OVER]
        if over and len(self.world.submitted) < 12:
            self.world.retry(over[index % len(over)])

    def _drain(self, undo: bool, deadline_s: float) -> None:
        self.world.drain(undo=undo, deadline_s=deadline_s)

    # -- programs

    def _finish(self, index: int, code: int) -> None:
        if running := self.world.engine.running():
            self.world.finish(running[index % len(running)], code, '{"x": 1}')

    def _write(self, index: int, text: str) -> None:
        if running := self.world.engine.running():
            self.world.write(running[index % len(running)], text.encode())

    def _let(self, seconds: float) -> None:
        self.world.let(seconds)

    def _stubborn(self, yes: bool) -> None:
        self.world.engine.stubborn = yes

    # -- what befalls them

    def _kill_agent(self) -> None:
        if self.world.agent_up:
            self.world.kill_agent()

    def _kill_agent_within(self, instants: int) -> None:
        if self.world.agent_up:
            self.world.kill_agent_within(instants)

    def _stop_agent(self) -> None:
        if self.world.agent_up:
            self.world.stop_agent()

    def _start_agent(self) -> None:
        if not self.world.agent_up:
            self.world.start_agent()

    def _kill_server(self) -> None:
        if self.world.server_up:
            self.world.kill_server()

    def _kill_server_within(self, instants: int) -> None:
        if self.world.server_up:
            self.world.kill_server_within(instants)

    def _stop_server(self) -> None:
        if self.world.server_up:
            self.world.stop_server()

    def _start_server(self) -> None:
        if not self.world.server_up:
            self.world.start_server()

    def _cut(self) -> None:
        self.world.cut()

    def _hush(self, *directions: str) -> None:
        self.world.hush(*directions)  # type: ignore[arg-type]

    def _heal(self) -> None:
        self.world.heal()

    def _stop_engine(self) -> None:
        if self.world.engine.up:
            self.world.stop_engine()

    def _start_engine(self) -> None:
        if not self.world.engine.up:
            self.world.start_engine()

    def _late_start(self, seconds: float) -> None:
        self.world.engine.late_s = seconds

    def _forget_start(self) -> None:
        self.world.engine.forgets = True

    def _reboot(self) -> None:
        self.world.reboot()

    def _meddle(self, index: int, remove: bool) -> None:
        if self.world.engine.up and (running := self.world.engine.running()):
            self.world.meddle(running[index % len(running)], remove=remove)

    def _jump(self, seconds: float) -> None:
        self.world.clocks.wall_offset_s += seconds
