"""An epoch's micro-batches on their way to the trainer, with their soft labels under way."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from student_trainer.data import Example
from student_trainer.labels import LabelPrefetcher

Batch = dict[str, Any]


class LookAhead:
    """Micro-batches read ``depth`` ahead of their use, each with a ticket for its labels, which are asked for then.

    ``step_of``: the optimizer step, counted from 0 over the whole run, of the epoch's n-th micro-batch from here.
    Where ``chooses`` says that a step is on-policy, ``decode`` makes its batches anew when they are used, for the
    student's weights of that time decide over them; only then can their labels be asked for, and they carry
    ``on_policy``.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        *,
        labels: LabelPrefetcher,
        examples: Mapping[int, Example],
        depth: int,
        step_of: Callable[[int], int],
        chooses: Callable[[int], bool] = lambda step: False,
        decode: Callable[[Sequence[Example], int], tuple[list[Example], Batch]] | None = None,
    ) -> None:
        self.batches = batches
        self._labels = labels
        self._examples = examples
        self._depth = depth
        self._step_of = step_of
        self._chooses = chooses
        self._decode = decode
        self._read = itertools.count()
        self._waiting: deque[Batch] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        for batch in itertools.islice(self.batches, self._depth + 1 - len(self._waiting)):
            self._waiting.append(self._expected(batch))
        if not self._waiting:
            raise StopIteration
        batch = self._waiting.popleft()
        return self._decoded(batch) if "decode_at" in batch else batch

    def _expected(self, batch: Batch) -> Batch:
        step = self._step_of(next(self._read))
        if self._chooses(step):
            return {**batch, "decode_at": step}
        return {**batch, "ticket": self._labels.request(self._of(batch))}

    def _decoded(self, batch: Batch) -> Batch:
        assert self._decode is not None, "a step is on-policy only where the student can decode"
        examples, decoded = self._decode(self._of(batch), batch["decode_at"])
        return {**decoded, "ticket": self._labels.request(examples), "on_policy": True}

    def _of(self, batch: Batch) -> list[Example]:
        return [self._examples[index] for index in batch["record_B"].tolist()]
