"""Who gets the next place at an engine, with a queue alone."""

import asyncio
import random
from collections import Counter, deque

from teacher_server.engine import Capacity
from teacher_server.fair_queue import FairQueue, Place


class Engine:
    """Takes places as it gets them and ends the one that has run longest on ``step``."""

    def __init__(self, *, sequences: int = 4, tokens: int = 10**9) -> None:
        self.queue = FairQueue(Capacity(sequences=sequences, tokens=tokens))
        self.running: deque[Place] = deque()
        self.served: list[Place] = []

    def ask(self, client: str, tokens: int, *, times: int = 1) -> list[Place]:
        return [self.queue.line_up(client, tokens=tokens, on_turn=self._begin) for _ in range(times)]

    def step(self) -> None:
        self.running.popleft().leave()

    def tokens_of(self) -> Counter[str]:
        tokens: Counter[str] = Counter()
        for place in self.served:
            tokens[place.client] += place.tokens
        return tokens

    def _begin(self, place: Place) -> None:
        self.running.append(place)
        self.served.append(place)


def test_clients_get_equal_tokens_however_much_they_ask_for() -> None:
    engine = Engine()
    random.seed(3)
    # 40 times as many sequences, and of another length.
    for _ in range(4000):
        engine.ask("many", random.randint(10, 100))
    for _ in range(100):
        engine.ask("few", random.randint(100, 400))
    while any(place.client == "few" for place in engine.running) or "few" in engine.queue._lines:
        engine.step()
    tokens = engine.tokens_of()
    assert abs(tokens["many"] - tokens["few"]) < 5 * 400


def test_who_asks_for_little_gets_all_of_it_and_the_others_share_the_rest() -> None:
    engine = Engine(sequences=2)
    engine.ask("a", 10, times=3000)
    engine.ask("b", 10, times=3000)
    for turn in range(3000):
        # A tenth of what the engine does, where a third would be its share.
        if turn % 10 == 0:
            engine.ask("small", 10)
        engine.step()
    counts = Counter(place.client for place in engine.served)
    assert counts["small"] >= 299
    assert abs(counts["a"] - counts["b"]) <= 2
    assert sum(counts.values()) == 3002


def test_a_pause_gives_no_claim_to_more_than_a_share() -> None:
    engine = Engine(sequences=1)
    engine.ask("busy", 10, times=2000)
    for _ in range(1000):
        engine.step()
    engine.ask("late", 10, times=500)
    before = len(engine.served)
    for _ in range(200):
        engine.step()
    counts = Counter(place.client for place in engine.served[before:])
    assert abs(counts["late"] - counts["busy"]) <= 2


def test_the_capacity_holds_and_long_sequences_are_not_passed_over() -> None:
    engine = Engine(sequences=4, tokens=100)
    engine.ask("a", 30, times=2)
    (long,) = engine.ask("b", 1000)
    engine.ask("a", 30, times=50)
    for _ in range(2):
        assert engine.queue.tokens <= 100
        engine.step()
    # Alone, because it is larger than the whole capacity.
    assert list(engine.running) == [long]
    engine.step()
    assert (engine.queue.sequences, engine.queue.tokens, engine.queue.waiting) == (3, 90, 47)


def test_whoever_leaves_makes_room_whether_waiting_or_working() -> None:
    engine = Engine(sequences=1)
    places = engine.ask("a", 5, times=4)
    places[1].leave()
    places[1].leave()
    assert engine.queue.waiting == 2
    places[0].leave()
    assert engine.served == [places[0], places[2]]
    places[2].leave()
    places[3].leave()
    places[3].leave()
    assert (engine.queue.sequences, engine.queue.tokens, engine.queue.waiting) == (0, 0, 0)


def test_a_turn_that_is_cancelled_while_it_waits_frees_its_place() -> None:
    async def run() -> None:
        queue = FairQueue(Capacity(sequences=1, tokens=100))
        entered: list[str] = []

        async def work(name: str, release: asyncio.Event) -> None:
            async with queue.turn(name, tokens=10):
                entered.append(name)
                await release.wait()

        first, other = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.ensure_future(work(name, first if name == "a" else other)) for name in "abc"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        first.set()
        other.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert entered == ["a", "c"]
        assert (queue.sequences, queue.tokens, queue.waiting) == (0, 0, 0)

    asyncio.run(run())


def test_newcomers_do_not_keep_others_waiting_and_are_forgotten_once_they_are_gone() -> None:
    idle, busy = Engine(sequences=1), Engine(sequences=1)
    busy.ask("steady", 1, times=9000)
    for number in range(4000):
        idle.ask(f"client {number}", 1)
        idle.step()
        busy.ask(f"client {number}", 1)
        busy.step()
        busy.step()
    assert len(idle.queue._times) <= 1
    assert len(busy.queue._times) < 2500
    counts = Counter(place.client == "steady" for place in busy.served)
    assert abs(counts[True] - counts[False]) <= 2
