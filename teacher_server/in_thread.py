"""Work that blocks for minutes, such as loading a model, beside an event loop."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


async def in_daemon_thread(work: Callable[[], ResultT], *, name: str) -> ResultT:
    """Run ``work`` so that a process told to stop need not wait for it."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[ResultT] = loop.create_future()

    def settle(result: list[ResultT], error: BaseException | None) -> None:
        if outcome.cancelled():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result[0])

    def run() -> None:
        result: list[ResultT] = []
        problem = None
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            problem = error
        try:
            loop.call_soon_threadsafe(settle, result, problem)
        except RuntimeError:
            logger.info("stopped before %s had ended", name)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await outcome
