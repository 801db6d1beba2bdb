"""Events, as they are stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from outrider.errors import InvalidInput
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2
from server_core.bus.base import EVENTS, Subscription
from server_core.control.common import Context, Part
from server_core.store import events

_PAGE = 200


class _Wishes:
    """What the caller wants by now; it may change its mind while it reads."""

    def __init__(self, filter_: pb.EventFilter) -> None:
        self.filter = filter_
        self.ended = False
        self.changed = asyncio.Event()

    async def follow(self, requests: AsyncIterator[pb.SubscribeEventsRequest]) -> None:
        async for request in requests:
            if request.HasField("filter"):
                self.filter = request.filter
                self.changed.set()
        self.ended = True
        self.changed.set()


class Events(Part):
    async def SubscribeEvents(
        self, request_iterator: AsyncIterator[pb.SubscribeEventsRequest], context: Context
    ) -> AsyncIterator[types_pb2.Event]:
        """A caller that closes its side gets what is stored, and then the end."""
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        if first.after < -1:
            raise InvalidInput("`after` is the number of an event, 0 (from now) or -1 (all)", code="bad_position")
        number = first.after if first.after > 0 else 0
        if first.after == 0:
            number = await self._s.db.read(events.last_number)
        wishes = _Wishes(first.filter)
        follower = asyncio.ensure_future(wishes.follow(request_iterator))
        try:
            with self._s.bus.subscribe(EVENTS) as subscription:
                while True:
                    ended = wishes.ended
                    page, number = await self._events_after(number, wishes.filter)
                    for event in page:
                        yield event
                    if len(page) < _PAGE:
                        if ended:
                            return
                        await _either(subscription, wishes)
        finally:
            follower.cancel()

    async def _events_after(self, number: int, filter_: pb.EventFilter) -> tuple[list[types_pb2.Event], int]:
        last = await self._s.db.read(events.last_number)
        page = list(await self._s.db.read(lambda c: events.after(c, number, filter_, _PAGE)))
        if len(page) == _PAGE:
            return page, page[-1].sequence
        # What the filter left out need not be looked at again.
        return page, max([number, last, *(event.sequence for event in page)])


async def _either(subscription: Subscription, wishes: _Wishes) -> None:
    """Wait until there is news, or the caller has changed its mind."""
    tasks = [asyncio.ensure_future(subscription.wait()), asyncio.ensure_future(wishes.changed.wait())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        wishes.changed.clear()
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
