"""Places at an engine, given out so that its clients get equal shares however much each of them asks for.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): every client has a virtual time that its tokens move forward, and
the client that is furthest behind comes next. Clients that ask for less than their share get all of it, and the others
divide what is left (max-min fairness).
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from teacher_server.engine import Capacity

_REMEMBERED_CLIENTS = 1024


class FairQueue:
    """Belongs to one event loop. ``capacity``: what may be at the engine at a time; one piece of work always may."""

    def __init__(self, capacity: Capacity) -> None:
        self.sequences = 0
        self.tokens = 0
        self._capacity = capacity
        self._lines: dict[str, deque[Place]] = {}
        self._times: dict[str, float] = {}
        self._clock = 0.0

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place."""
        return sum(map(len, self._lines.values()))

    def line_up(self, client: str, *, tokens: int, on_turn: "Callable[[Place], None]") -> "Place":
        """A place that waits; ``on_turn`` is called with it when work may begin, perhaps before this returns.

        Whoever lines up must ``leave`` in the end: that ends the waiting or the work.
        """
        place = Place(self, client, tokens=tokens, on_turn=on_turn)
        if client not in self._lines:
            self._forget_clients()
            # Time spent away gives no claim to more than a share now.
            self._times[client] = max(self._times.get(client, 0.0), self._clock)
            self._lines[client] = deque()
        self._lines[client].append(place)
        self._give_places()
        return place

    @asynccontextmanager
    async def turn(self, client: str, *, tokens: int) -> AsyncIterator[None]:
        """Wait for a place and hold it while the block runs."""
        granted = asyncio.Event()
        place = self.line_up(client, tokens=tokens, on_turn=lambda _: granted.set())
        try:
            await granted.wait()
            yield
        finally:
            place.leave()

    def _give_places(self) -> None:
        while self._lines:
            client = min(self._lines, key=self._times.__getitem__)
            place = self._lines[client][0]
            # Whoever is next is never passed over, or small sequences would keep a long one out for ever.
            if self.sequences and (
                self.sequences >= self._capacity.sequences or self.tokens + place.tokens > self._capacity.tokens
            ):
                return
            self._remove(place)
            self._clock = self._times[client]
            self._times[client] += place.tokens
            self.sequences += 1
            self.tokens += place.tokens
            place.state = "working"
            place.tell()

    def _leave(self, place: "Place") -> None:
        if place.state == "waiting":
            self._remove(place)
        elif place.state == "working":
            self.sequences -= 1
            self.tokens -= place.tokens
        place.state = "left"
        if self._lines:
            self._give_places()
        elif not self.sequences:
            # Nobody is behind or ahead of anybody any more.
            self._times.clear()

    def _remove(self, place: "Place") -> None:
        line = self._lines[place.client]
        line.remove(place)
        if not line:
            del self._lines[place.client]

    def _forget_clients(self) -> None:
        if len(self._times) > _REMEMBERED_CLIENTS:
            # Those behind the clock would start at the clock anyway.
            ahead = {
                client: time for client, time in self._times.items() if time > self._clock or client in self._lines
            }
            self._times = ahead


class Place:
    """Of one piece of work in a FairQueue: waiting, working, left."""

    def __init__(self, queue: FairQueue, client: str, *, tokens: int, on_turn: "Callable[[Place], None]") -> None:
        self.client = client
        self.tokens = tokens
        self.state = "waiting"
        self._queue = queue
        self._on_turn: Callable[[Place], None] | None = on_turn

    def tell(self) -> None:
        """That the turn has come."""
        assert self._on_turn is not None, "no turn comes to those who left"
        self._on_turn(self)

    def leave(self) -> None:
        """End the waiting or the work; once is enough and more does no harm."""
        if self.state != "left":
            # Who was told may hold labels, and holds this place: a cycle that only the garbage collector would end.
            self._on_turn = None
            self._queue._leave(self)
