"""Labels under way: whoever asks for the same at the same time gets one computation.

What is handed to the engine never waits for a reader, so that nobody who joins depends on another's speed; and it goes
on as long as one of those who asked still waits.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from teacher_server.fair_queue import FairQueue, Place


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Labels in their wire form, without an id."""

    data: bytes
    from_cache: bool


class Flights:
    """What is under way, by key."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}

    @contextmanager
    def join(self, key: str, produce: "Callable[[Flight], Coroutine[Any, Any, Payload]]") -> Iterator["Flight"]:
        """The flight with this key, begun unless it is under way; cancelled when nobody wants it any more."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight()
            flight.begin(produce(flight), on_end=lambda ended: self._forget(key, ended))
        flight.wanted += 1
        try:
            yield flight
        finally:
            flight.wanted -= 1
            if not flight.wanted:
                # Nobody may join what is about to be cancelled.
                self._forget(key, flight)
                flight.task.cancel()

    def _forget(self, key: str, flight: "Flight") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class Flight:
    """One computation: it looks in the cache, may wait for the first place at the engine that any of those who want
    it gets, and ends in a Payload."""

    task: asyncio.Task[Payload]

    def __init__(self) -> None:
        self.wanted = 0
        loop = asyncio.get_running_loop()
        self._missed: asyncio.Future[None] = loop.create_future()
        self._place: asyncio.Future[Place] = loop.create_future()
        self._waiting: list[Place] = []

    def begin(self, work: Coroutine[Any, Any, Payload], *, on_end: "Callable[[Flight], None]") -> None:
        self.task = asyncio.get_running_loop().create_task(work)
        self.task.add_done_callback(lambda _: self._end(on_end))

    # For those who want it:

    async def is_missing(self) -> bool:
        """Whether it has to be computed, once that is known."""
        known: list[asyncio.Future[Any]] = [self.task, self._missed]
        await asyncio.wait(known, return_when=asyncio.FIRST_COMPLETED)
        return self._missed.done()

    @contextmanager
    def lined_up(self, queue: FairQueue, client: str, *, tokens: int) -> Iterator[None]:
        """Wait for a place in ``client``'s name, unless the flight has one already."""
        if self._place.done():
            yield
            return
        place = queue.line_up(client, tokens=tokens, on_turn=self._take)
        self._waiting.append(place)
        try:
            yield
        finally:
            self._waiting.remove(place)
            if self._given() is not place:
                place.leave()

    # For the work itself:

    def announce_miss(self) -> None:
        self._missed.set_result(None)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place at the engine and hold it while the block runs."""
        place = await self._place
        try:
            yield
        finally:
            place.leave()

    def _take(self, place: Place) -> None:
        if self._place.done():
            place.leave()
            return
        self._place.set_result(place)
        for other in [other for other in self._waiting if other is not place]:
            other.leave()

    def _end(self, on_end: "Callable[[Flight], None]") -> None:
        on_end(self)
        place = self._given()
        if place is not None:
            # Unless it was cancelled between being given a place and taking it, it has left already.
            place.leave()
        if not self.task.cancelled():
            # Nobody may be left to retrieve it.
            self.task.exception()

    def _given(self) -> Place | None:
        return self._place.result() if self._place.done() and not self._place.cancelled() else None
