"""Keeps the queue true to the store: the safety net under every lost wake-up.

Whatever happens to workers or to Redis, a stage that is ready is queued within seconds, and a stage whose
worker fell silent becomes ready again when its lease runs out.
"""

import logging
import threading
import time

from services.contract.errors import QueueUnavailableError, StoreUnavailableError
from services.contract.records import StageRecord
from services.contract.settings import Settings
from services.contract.states import StageKind
from services.store.queue import Queue, job_id
from services.store.store import Store

log = logging.getLogger("smoothkd.reconciler")


class Reconciler:
    """One pass every ``interval_seconds`` in a thread of its own, between ``start`` and ``stop``.

    A stage that left the queue but was not begun within ``grace_seconds`` counts as lost and is queued again; were
    it not lost after all, the store lets only one of the two begin. Several reconcilers do no harm.
    """

    def __init__(
        self,
        store: Store,
        queue: Queue,
        settings: Settings,
        *,
        interval_seconds: float = 2.0,
        grace_seconds: float = 5.0,
    ) -> None:
        self._store = store
        self._queue = queue
        self._max_attempts = settings.max_attempts
        self._interval_seconds = interval_seconds
        self._grace_seconds = grace_seconds
        self._missing_since: dict[str, float] = {}
        self._outage: str | None = None
        self._stopping = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the pass under way, if any, has ended."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Has the next pass begin now, as after a sweep was created."""
        self._wake.set()

    def run_once(self) -> None:
        """One pass. An outage of Redis or of the database is logged when it begins and when it ends."""
        try:
            for stage in self._store.reclaim_expired(max_attempts=self._max_attempts):
                log.warning("stage %s: its worker fell silent; the stage is now %s", stage.id, stage.state)
            self._queue.clean()
            self._queue_ready()
        except (QueueUnavailableError, StoreUnavailableError) as error:
            if self._outage is None:
                log.warning("%s; trying on", error.what)
            self._outage = error.reason
            return
        if self._outage is not None:
            log.info("recovered from %s", self._outage)
            self._outage = None

    def _queue_ready(self) -> None:
        waiting = self._queue.waiting()
        # Read after the queue: a stage that a worker begins between the two reads is no longer ready.
        missing = {
            job_id(stage.id, stage.attempt + 1): stage
            for stage in self._store.ready_stages()
            if job_id(stage.id, stage.attempt + 1) not in waiting
        }
        now = time.monotonic()
        self._missing_since = {name: self._missing_since.get(name, now) for name in missing}
        for name, stage in missing.items():
            if self._enqueue(stage):
                del self._missing_since[name]
            elif now - self._missing_since[name] >= self._grace_seconds:
                log.warning("stage %s left the queue and was not begun; queueing it again", stage.id)
                self._queue.forget(stage.id, stage.attempt + 1)
                self._enqueue(stage)
                del self._missing_since[name]

    def _enqueue(self, stage: StageRecord) -> bool:
        # A trained student is evaluated before the next is trained: results come in from the first run on.
        return self._queue.enqueue(stage.id, stage.attempt + 1, front=stage.kind == StageKind.EVALUATE)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self.run_once()
            except Exception:
                log.exception("the reconciler's pass failed; the next follows in %g s", self._interval_seconds)
            self._wake.wait(self._interval_seconds)
