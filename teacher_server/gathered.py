"""Work that is cheaper done together: what is asked for while a thread is busy waits, and is its next batch."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Gathered(Generic[ItemT, ResultT]):
    """Has ``compute`` called in ``executor``, one batch of at most ``most`` items at a time; belongs to one event loop.

    ``compute`` gives a result per item, in their order. Where it fails for a batch, each of its items is computed
    alone, so that an error reaches only those that cause it.
    """

    def __init__(
        self, compute: Callable[[Sequence[ItemT]], Sequence[ResultT]], *, executor: Executor, most: int
    ) -> None:
        self._compute = compute
        self._executor = executor
        self._most = most
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, item: ItemT) -> ResultT:
        answer: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._worker is None:
            # It begins in the loop's next turn: whatever else arrives in this one is in its first batch.
            self._worker = asyncio.get_running_loop().create_task(self._work())
        return await answer

    async def _work(self) -> None:
        batch: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        try:
            while self._waiting:
                batch = [waiting for waiting in self._waiting[: self._most] if not waiting[1].done()]
                del self._waiting[: self._most]
                await self._answer(batch)
        finally:
            self._worker = None
            # Nobody else would answer them when this has been cancelled, or the executor closed.
            for _, answer in (*batch, *self._waiting):
                answer.cancel()

    async def _answer(self, batch: Sequence[tuple[ItemT, asyncio.Future[ResultT]]]) -> None:
        if not batch:
            return
        items = [item for item, _ in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, items)
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            if len(batch) > 1:
                for single in batch:
                    await self._answer([] if single[1].done() else [single])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, answer), result in zip(batch, results, strict=True):
            # Whoever asked may have given up meanwhile.
            if not answer.done():
                answer.set_result(result)
