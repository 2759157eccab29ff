"""One worker thread around a model that computes in batches, for everything that is asked of it at the same time.

The job that has waited longest leads each batch, and those of like length join it, so that nobody waits for ever and
little is padded. While a batch decodes, waiting score batches run between its steps.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from services.contract.errors import SmoothKDError, TeacherUnavailableError
from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ScoredSequence
from services.contract.tensors import Array
from teacher_server.engine import BatchReport, Capacity, TeacherCard
from teacher_server.student_heads import StudentHeads

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""Batches' worth of work that an engine is given at a time: enough to find sequences of like length in, and little
enough that a client who comes later does not wait long behind what nobody can take back."""

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

    @property
    def student_heads(self) -> StudentHeads[Any]: ...

    def tokenize(self, text: str) -> list[int]: ...

    def reference_logits(self, token_ids: Sequence[int]) -> Array: ...

    def score(self, work: Sequence[tuple[TokenSequence, LabelOptions]]) -> Sequence[ScoredSequence]: ...

    def generate(self, prompts: Sequence[Prompt], options: DecodeOptions, watch: DecodeWatch) -> None: ...


class BatchingEngine:
    """An Engine around a BatchModel."""

    def __init__(self, model: BatchModel) -> None:
        self._model = model
        self._waiting: list[_Job] = []
        self._computing: list[_Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._report: BatchReport | None = None
        self._worker = threading.Thread(target=self._work, name="teacher-engine", daemon=True)
        self._worker.start()

    @property
    def score_capacity(self) -> Capacity:
        return Capacity(
            sequences=BATCHES_AHEAD * self._model.max_batch_sequences,
            tokens=BATCHES_AHEAD * self._model.max_batch_tokens,
        )

    @property
    def decode_capacity(self) -> Capacity:
        return self.score_capacity

    def describe(self) -> TeacherCard:
        return self._model.card

    def lm_head(self) -> LmHead:
        return self._model.head

    @property
    def student_heads(self) -> StudentHeads[Any]:
        return self._model.student_heads

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text)

    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        return self._model.reference_logits(token_ids)

    async def score(self, sequence: TokenSequence, options: LabelOptions) -> ScoredSequence:
        scored: ScoredSequence = await self._result(_Job(sequence, options, length=len(sequence.token_ids)))
        return scored

    async def generate(self, prompt: Prompt, options: DecodeOptions) -> Continuation:
        length = len(prompt.token_ids) + options.max_new_tokens
        continuation: Continuation = await self._result(_Job(prompt, options, length=length))
        return continuation

    def watch_batches(self, report: BatchReport) -> None:
        self._report = report

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *self._computing]:
                job.fail(_stopped())
            self._changed.notify_all()

    async def _result(self, job: "_Job") -> Any:
        with self._changed:
            if self._closed:
                raise _stopped()
            self._waiting.append(job)
            self._changed.notify_all()
        try:
            return await job.outcome
        finally:
            with self._changed:
                job.ended = True
                if job in self._waiting:
                    self._waiting.remove(job)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._waiting:
                    self._changed.wait()
                if self._closed:
                    return
                batch = self._take_batch(self._waiting)
            self._carry_out(batch)

    def _take_batch(self, candidates: "list[_Job]") -> "list[_Job]":
        """The longest waiting of ``candidates`` and what goes well with it; the lock is held."""
        first = candidates[0]
        batch = _Batch(first, max_tokens=self._model.max_batch_tokens, max_sequences=self._model.max_batch_sequences)
        alike = [job for job in candidates[1:] if job.shares_batches_with(first)]
        for job in sorted(alike, key=lambda job: abs(job.length - first.length)):
            if batch.admits(job):
                batch.jobs.append(job)
        for job in batch.jobs:
            self._waiting.remove(job)
        self._computing.extend(batch.jobs)
        return batch.jobs

    def _carry_out(self, batch: "list[_Job]") -> None:
        try:
            self._compute_or_divide(batch)
        finally:
            with self._changed:
                for job in batch:
                    self._computing.remove(job)

    def _compute_or_divide(self, batch: "list[_Job]") -> None:
        """A batch that fails is computed one by one, so that whatever made it fail concerns nobody else."""
        batch = [job for job in batch if not job.ended]
        try:
            self._compute(batch)
        except Exception as error:
            if len(batch) > 1:
                logger.warning("a batch of %d failed (%s) and is computed one by one", len(batch), error)
                for job in batch:
                    self._compute_or_divide([job])
            elif batch:
                if not isinstance(error, SmoothKDError):
                    logger.exception("a sequence failed")
                batch[0].fail(error)

    def _compute(self, batch: "list[_Job]") -> None:
        if not batch:
            return
        if batch[0].decodes:
            watch = _Watch(batch, between_steps=self._score_one_batch)
            self._model.generate([job.item for job in batch], batch[0].options, watch)
        else:
            scored = self._model.score([(job.item, job.options) for job in batch])
            for job, labels in zip(batch, scored, strict=True):
                job.finish(labels)
        if self._report is not None:
            self._report(sequences=len(batch), tokens=sum(len(job.item.token_ids) for job in batch))

    def _score_one_batch(self) -> None:
        with self._changed:
            scores = [] if self._closed else [job for job in self._waiting if not job.decodes]
            batch = self._take_batch(scores) if scores else []
        self._carry_out(batch)


class _Job:
    """One sequence or prompt; ``length`` in tokens counts what it occupies in a batch.

    ``ended``: it has its outcome, or nobody waits for it any more.
    """

    def __init__(self, item: Any, options: Any, *, length: int) -> None:
        self.item = item
        self.options = options
        self.length = length
        self.ended = False
        self._loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[Any] = self._loop.create_future()

    @property
    def decodes(self) -> bool:
        return isinstance(self.options, DecodeOptions)

    def shares_batches_with(self, other: "_Job") -> bool:
        return self.options == other.options if self.decodes else not other.decodes

    def finish(self, result: Any) -> None:
        self._settle(lambda: self.outcome.set_result(result))

    def fail(self, error: Exception) -> None:
        self._settle(lambda: self.outcome.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        self.ended = True
        # RuntimeError: the loop has ended, and with it everybody who could read.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: None if self.outcome.done() else settle())


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
        return job.decodes or sum(lengths) >= _LEAST_USEFUL * padded


class _Watch:
    def __init__(self, batch: list[_Job], *, between_steps: Callable[[], None]) -> None:
        self._batch = batch
        self.after_step = between_steps

    def finish(self, index: int, continuation: Continuation) -> None:
        self._batch[index].finish(continuation)

    def is_cancelled(self, index: int) -> bool:
        return self._batch[index].ended


def _stopped() -> TeacherUnavailableError:
    return TeacherUnavailableError("the teacher is stopping", fix="Ask again once it has restarted.")
