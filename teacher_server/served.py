"""One set of weights that a server has checked, and the requests that compute with it."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from services.contract.errors import TeacherUnavailableError
from teacher_server.engine import Engine, TeacherCard
from teacher_server.options import DtypeName
from teacher_server.weights import Weights

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0
"""How long requests under way may take to end before weights that are replaced in place."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What is known of weights once they were loaded. ``label_dtype``: in which hidden states travel;
    ``determinism_spread``: see teacher_server.determinism; ``load_seconds`` includes the checks.
    """

    weights: Weights
    card: TeacherCard
    label_dtype: DtypeName
    determinism_spread: float
    load_seconds: float


class Served:
    """An engine with its weights. It is closed by the last request that uses it after it was retired."""

    def __init__(self, engine: Engine, checked: Checked) -> None:
        self.engine = engine
        self.checked = checked
        self.began = time.monotonic()
        self._last_used = -float("inf")
        self._uses: set[_Use] = set()
        self._retired = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around a request. TeacherUnavailableError ends it where the weights must go before it does."""
        use = _Use(asyncio.current_task())
        self._uses.add(use)
        try:
            yield
        except asyncio.CancelledError:
            if not use.evicted:
                raise
            use.keep_task()
            raise TeacherUnavailableError(
                "the teacher has gone over to other weights", fix="Ask for what is missing again."
            ) from None
        finally:
            self._last_used = time.monotonic()
            self._uses.discard(use)
            if self._retired and not self._uses:
                self.engine.close()

    def idle_seconds(self) -> float:
        """Since the last request ended; 0 while one is under way."""
        return 0.0 if self._uses else time.monotonic() - self._last_used

    def retire(self) -> None:
        """Nothing new will use these weights."""
        self._retired = True
        if not self._uses:
            self.engine.close()

    async def drain(self) -> None:
        """Wait until no request uses the weights; those that still do after DRAIN_SECONDS are ended."""
        ends = time.monotonic() + DRAIN_SECONDS
        while self._uses:
            if time.monotonic() > ends:
                for use in self._uses:
                    use.evict()
            await asyncio.sleep(0.02)


class _Use:
    """One request. ``evict`` ends it through its task, as asyncio.timeout does."""

    def __init__(self, task: "asyncio.Task[object] | None") -> None:
        self._task = task
        self.evicted = False

    def evict(self) -> None:
        if self._task is not None and not self.evicted:
            logger.warning("ending a request before other weights are loaded")
            self.evicted = True
            self._task.cancel()

    def keep_task(self) -> None:
        if self._task is not None:
            self._task.uncancel()
