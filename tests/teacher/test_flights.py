"""Computations that several requests share, with a queue and no server."""

import asyncio
import gc
import weakref
from typing import Any

from teacher_server.engine import Capacity
from teacher_server.fair_queue import FairQueue
from teacher_server.flights import Flight, Flights, Payload


def queue() -> FairQueue:
    return FairQueue(Capacity(sequences=1, tokens=100))


async def ask(flights: Flights, places: FairQueue, client: str, compute: Any) -> Payload:
    async def produce(flight: Flight) -> Payload:
        flight.announce_miss()
        async with flight.place():
            return await compute()

    with flights.join("key", produce) as flight:
        assert await flight.is_missing()
        with flight.lined_up(places, client, tokens=10):
            return await asyncio.shield(flight.task)


def test_labels_are_gone_once_they_were_answered() -> None:
    watched: list[Any] = []

    async def compute() -> Payload:
        payload = Payload(data=bytes(1000), from_cache=False)
        watched.append(weakref.ref(payload))
        return payload

    async def run() -> None:
        places, flights = queue(), Flights()
        assert len((await ask(flights, places, "a", compute)).data) == 1000
        await asyncio.sleep(0)
        # Without the garbage collector, whose rounds come late for things this large.
        assert watched[0]() is None
        assert (places.sequences, places.waiting) == (0, 0)

    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_the_first_place_that_anyone_gets_computes_for_all_and_the_others_are_given_back() -> None:
    started: list[int] = []
    release = asyncio.Event()

    async def compute() -> Payload:
        started.append(1)
        await release.wait()
        return Payload(data=b"labels", from_cache=False)

    async def run() -> None:
        places, flights = queue(), Flights()
        blocked = places.line_up("other", tokens=10, on_turn=lambda place: None)
        askers = [asyncio.ensure_future(ask(flights, places, client, compute)) for client in "abc"]
        while places.waiting < 3:
            await asyncio.sleep(0)
        # Whoever leaves takes a place along, and nothing else.
        askers[0].cancel()
        await asyncio.wait(askers[:1])
        assert places.waiting == 2
        blocked.leave()
        while not started:
            await asyncio.sleep(0)
        assert (places.sequences, places.waiting) == (1, 0)
        # The place is the computation's own: it stays although the one who brought it has gone.
        askers[1].cancel()
        await asyncio.wait(askers[1:2])
        assert (places.sequences, places.waiting) == (1, 0)
        release.set()
        assert (await askers[2]).data == b"labels"
        assert (len(started), places.sequences, places.tokens) == (1, 0, 0)

    asyncio.run(run())


def test_a_place_that_comes_as_everybody_leaves_is_given_back() -> None:
    async def compute() -> Payload:
        raise AssertionError("nobody wants it")

    async def run() -> None:
        places, flights = queue(), Flights()
        blocked = places.line_up("other", tokens=10, on_turn=lambda place: None)
        asker = asyncio.ensure_future(ask(flights, places, "a", compute))
        while not places.waiting:
            await asyncio.sleep(0)
        # Both before anybody can act on either.
        asker.cancel()
        blocked.leave()
        await asyncio.wait([asker])
        for _ in range(5):
            await asyncio.sleep(0)
        assert (places.sequences, places.tokens, places.waiting) == (0, 0, 0)

    asyncio.run(run())
