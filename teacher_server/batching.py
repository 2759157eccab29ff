"""One queue for everything that clients ask of a model that computes in batches.

Each request is a lane. One worker thread takes a batch from the lanes, a different lane first each time, so that
no client waits for another's whole request; sequences of like length share a batch, so that little is padded. While
a batch decodes, waiting score batches run between its steps.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from services.contract.errors import SmoothKDError, TeacherUnavailableError
from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import Array, ScoredSequence
from teacher_server.engine import TeacherCard
from teacher_server.sizes import label_bytes

logger = logging.getLogger(__name__)

UNREAD_BYTES = 16 * 1024 * 1024
"""Labels of one request that may wait for a slow reader before the request is computed no further."""

_LEAST_USEFUL = 0.75
"""Share of a score batch that must be real tokens rather than padding."""


class DecodeWatch(Protocol):
    """How a model that decodes a batch reports to the queue."""

    def finish(self, index: int, continuation: Continuation) -> None: ...

    def is_cancelled(self, index: int) -> bool: ...

    def after_step(self) -> None:
        """To be called after each step, with no lock held: other work may run in here."""
        ...


class BatchModel(Protocol):
    """A model that computes one batch at a time, always from the same thread."""

    card: TeacherCard
    head: LmHead
    max_batch_tokens: int
    max_batch_sequences: int

    def tokenize(self, text: str) -> list[int]: ...

    def reference_logits(self, token_ids: Sequence[int]) -> Array: ...

    def score(self, work: Sequence[tuple[TokenSequence, LabelOptions]]) -> Sequence[ScoredSequence]: ...

    def generate(self, prompts: Sequence[Prompt], options: DecodeOptions, watch: DecodeWatch) -> None: ...


class BatchingEngine:
    """An Engine around a BatchModel."""

    def __init__(self, model: BatchModel) -> None:
        self._model = model
        self._lanes: deque[_Lane] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="teacher-engine", daemon=True)
        self._worker.start()

    def describe(self) -> TeacherCard:
        return self._model.card

    def lm_head(self) -> LmHead:
        return self._model.head

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text)

    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        return self._model.reference_logits(token_ids)

    async def score(
        self, sequences: Sequence[TokenSequence], options: LabelOptions
    ) -> AsyncGenerator[ScoredSequence, None]:
        card = self._model.card
        jobs = [
            _Job(
                item=sequence,
                options=options,
                length=len(sequence.token_ids),
                result_bytes=label_bytes(
                    options,
                    positions=len(sequence.label_positions),
                    vocab_size=card.vocab_size,
                    hidden_size=card.hidden_size,
                ),
            )
            for sequence in sequences
        ]
        async with aclosing(self._results(jobs, decode=None)) as results:
            async for result in results:
                yield result

    async def generate(self, prompts: Sequence[Prompt], options: DecodeOptions) -> AsyncGenerator[Continuation, None]:
        jobs = [
            _Job(item=prompt, options=options, length=len(prompt.token_ids) + options.max_new_tokens, result_bytes=0)
            for prompt in prompts
        ]
        async with aclosing(self._results(jobs, decode=options)) as results:
            async for result in results:
                yield result

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for lane in self._lanes:
                lane.deliver_error(_stopped())
            self._changed.notify_all()

    async def _results(self, jobs: "list[_Job]", *, decode: DecodeOptions | None) -> AsyncGenerator[Any, None]:
        lane = _Lane(jobs, decode=decode)
        with self._changed:
            if self._closed:
                raise _stopped()
            self._lanes.append(lane)
            self._changed.notify_all()
        try:
            for _ in jobs:
                job, result = await lane.arrival()
                yield result
                with self._changed:
                    lane.unread_bytes -= job.result_bytes
                    self._changed.notify_all()
        finally:
            with self._changed:
                lane.closed = True
                lane.waiting.clear()
                self._lanes.remove(lane)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not (batch := self._take_batch(scores_only=False)):
                    self._changed.wait()
                if self._closed:
                    return
            self._carry_out(batch)

    def _take_batch(self, *, scores_only: bool) -> "list[_Job]":
        """The next batch, or nothing; the lock is held."""
        ready = [lane for lane in self._lanes if lane.may_compute() and not (scores_only and lane.decode)]
        if not ready:
            return []
        first = ready[0]
        # The lane that comes first now comes last next time.
        self._lanes.remove(first)
        self._lanes.append(first)
        batch = _Batch(
            first.take(),
            max_tokens=self._model.max_batch_tokens,
            max_sequences=self._model.max_batch_sequences,
        )
        sharing = [lane for lane in ready if lane.decode == first.decode]
        while sharing:
            sharing = [lane for lane in sharing if lane.may_compute() and batch.admits(lane.waiting[0])]
            for lane in sharing:
                if lane.may_compute() and batch.admits(lane.waiting[0]):
                    batch.jobs.append(lane.take())
        return batch.jobs

    def _carry_out(self, batch: "list[_Job]") -> None:
        try:
            decode = batch[0].lane.decode
            if decode is None:
                scored = self._model.score([(job.item, job.options) for job in batch])
                for job, labels in zip(batch, scored, strict=True):
                    job.lane.deliver(job, labels)
            else:
                watch = _Watch(batch, between_steps=self._score_one_batch)
                self._model.generate([job.item for job in batch], decode, watch)
        except Exception as error:
            if not isinstance(error, SmoothKDError):
                logger.exception("a batch of %d sequences failed", len(batch))
            for lane in {id(job.lane): job.lane for job in batch}.values():
                lane.deliver_error(error)

    def _score_one_batch(self) -> None:
        with self._changed:
            batch = [] if self._closed else self._take_batch(scores_only=True)
        if batch:
            self._carry_out(batch)


@dataclass(kw_only=True, eq=False)
class _Job:
    """One sequence or prompt; ``length`` in tokens counts what it occupies in a batch."""

    item: Any
    options: Any
    length: int
    result_bytes: int
    lane: Any = None


class _Lane:
    """One request. ``decode``: the options all its prompts share; None for a score request."""

    def __init__(self, jobs: list[_Job], *, decode: DecodeOptions | None) -> None:
        # Longest first: what needs most memory shows at once, and neighbours have like lengths.
        self.waiting = deque(sorted(jobs, key=lambda job: job.length, reverse=True))
        for job in jobs:
            job.lane = self
        self.decode = decode
        self.closed = False
        self.unread_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._arrivals: asyncio.Queue[tuple[_Job | None, Any]] = asyncio.Queue()

    def may_compute(self) -> bool:
        if self.closed or not self.waiting:
            return False
        return self.unread_bytes == 0 or self.unread_bytes + self.waiting[0].result_bytes <= UNREAD_BYTES

    def take(self) -> _Job:
        job = self.waiting.popleft()
        self.unread_bytes += job.result_bytes
        return job

    def deliver(self, job: _Job, result: Any) -> None:
        self._send((job, result))

    def deliver_error(self, error: Exception) -> None:
        self._send((None, error))

    async def arrival(self) -> tuple[_Job, Any]:
        job, result = await self._arrivals.get()
        if job is None:
            raise result
        return job, result

    def _send(self, arrival: tuple[_Job | None, Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrivals.put_nowait, arrival)
        except RuntimeError:
            # The loop has ended, and with it everybody who could read.
            self.closed = True


class _Batch:
    def __init__(self, first: _Job, *, max_tokens: int, max_sequences: int) -> None:
        self.jobs = [first]
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences

    def admits(self, job: _Job) -> bool:
        lengths = [job.length, *(member.length for member in self.jobs)]
        padded = max(lengths) * len(lengths)
        if len(lengths) > self._max_sequences or padded > self._max_tokens:
            return False
        # Prompts are padded for the first step only.
        return job.lane.decode is not None or sum(lengths) >= _LEAST_USEFUL * padded


class _Watch:
    def __init__(self, batch: list[_Job], *, between_steps: Callable[[], None]) -> None:
        self._batch = batch
        self.after_step = between_steps

    def finish(self, index: int, continuation: Continuation) -> None:
        job = self._batch[index]
        job.lane.deliver(job, continuation)

    def is_cancelled(self, index: int) -> bool:
        return bool(self._batch[index].lane.closed)


def _stopped() -> TeacherUnavailableError:
    return TeacherUnavailableError("the teacher is stopping", fix="Ask again once it has restarted.")
