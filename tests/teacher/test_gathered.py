"""Batches of what arrives together, against a computation that records them."""

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from teacher_server.gathered import Gathered


def run_async(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


class Squares:
    """Squares of numbers; refuses negative ones; waits for ``may_go``."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.begun = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.begun.set()
        assert self.may_go.wait(30)
        self.batches.append(list(numbers))
        if any(number < 0 for number in numbers):
            raise ValueError("negative")
        return [number**2 for number in numbers]


async def held(squares: Squares, gathered: Gathered[int, int]) -> asyncio.Task[int]:
    """A batch of the number 1 alone, which is under way until ``may_go``."""
    squares.may_go.clear()
    first = asyncio.create_task(gathered(1))
    await asyncio.to_thread(squares.begun.wait, 30)
    return first


@run_async
async def test_what_arrives_together_is_computed_together(executor: ThreadPoolExecutor) -> None:
    squares = Squares()
    gathered = Gathered(squares, executor=executor, most=4)
    assert await asyncio.gather(*(gathered(number) for number in range(6))) == [0, 1, 4, 9, 16, 25]
    assert squares.batches == [[0, 1, 2, 3], [4, 5]]
    assert await gathered(7) == 49


@run_async
async def test_what_arrives_meanwhile_is_the_next_batch(executor: ThreadPoolExecutor) -> None:
    squares = Squares()
    gathered = Gathered(squares, executor=executor, most=4)
    first = await held(squares, gathered)
    rest = [asyncio.create_task(gathered(number)) for number in (2, 3)]
    await asyncio.sleep(0)
    squares.may_go.set()
    assert await asyncio.gather(first, *rest) == [1, 4, 9]
    assert squares.batches == [[1], [2, 3]]


@run_async
async def test_an_error_reaches_only_its_cause(executor: ThreadPoolExecutor) -> None:
    gathered = Gathered(Squares(), executor=executor, most=4)
    results = await asyncio.gather(*(gathered(number) for number in (2, -1, 3)), return_exceptions=True)
    assert results[0] == 4
    assert results[2] == 9
    assert isinstance(results[1], ValueError)
    assert await gathered(5) == 25


@run_async
async def test_whoever_gave_up_while_waiting_costs_nothing(executor: ThreadPoolExecutor) -> None:
    squares = Squares()
    gathered = Gathered(squares, executor=executor, most=4)
    first = await held(squares, gathered)
    given_up, patient = asyncio.create_task(gathered(2)), asyncio.create_task(gathered(3))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    squares.may_go.set()
    assert await asyncio.gather(first, patient) == [1, 9]
    assert squares.batches == [[1], [3]]


@run_async
async def test_what_was_given_up_is_not_tried_again(executor: ThreadPoolExecutor) -> None:
    squares = Squares()
    squares.may_go.clear()
    gathered = Gathered(squares, executor=executor, most=4)
    given_up, failing, patient = (asyncio.create_task(gathered(number)) for number in (2, -1, 3))
    await asyncio.to_thread(squares.begun.wait, 30)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    squares.may_go.set()
    assert await patient == 9
    with pytest.raises(ValueError, match="negative"):
        await failing
    assert squares.batches == [[2, -1, 3], [-1], [3]]


@run_async
async def test_nobody_waits_for_an_executor_that_closed() -> None:
    squares = Squares()
    squares.may_go.clear()
    executor = ThreadPoolExecutor(1)
    blocker = executor.submit(squares, [0])
    await asyncio.to_thread(squares.begun.wait, 30)
    gathered = Gathered(squares, executor=executor, most=4)
    waiting = asyncio.create_task(gathered(1))
    async with asyncio.timeout(30):
        while not executor._work_queue.qsize():
            await asyncio.sleep(0)
    executor.shutdown(wait=False, cancel_futures=True)
    squares.may_go.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(waiting, 30)
    blocker.result(30)
    with pytest.raises(RuntimeError, match="shutdown"):
        await asyncio.wait_for(gathered(2), 30)
