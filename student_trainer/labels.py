"""Where soft labels enter: asked for a few batches ahead of the step that needs them, and matched by id.

Shape suffixes: N response tokens of a batch, K kept tokens, E the teacher's hidden size, V vocabulary.
"""

import contextvars
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import ml_dtypes
import numpy as np
import torch

from services.contract.errors import CancelledError
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import (
    ExactLabels,
    FullLabels,
    ProjectedLabels,
    SampledLabels,
    ScoredSequence,
    SoftLabels,
    TopKLabels,
)
from services.contract.tensors import Array
from student_trainer.alignment import blaming_teacher, verify_token_logprobs
from student_trainer.data import Example
from student_trainer.label_source import LabelSource
from student_trainer.output_head import OutputHead
from student_trainer.targets import (
    ExactTargets,
    FullTargets,
    MixedTargets,
    ProjectedTargets,
    SampledTargets,
    SoftTargets,
    TopKTargets,
    UniversalTargets,
)

REQUESTS_AT_ONCE = 4
"""Batches under way at the teacher; it scores sequences of several requests together."""


@dataclass(frozen=True, kw_only=True)
class BatchLabels:
    """The sequences that labels were asked for, in the batch's order, and what each teacher answered to them."""

    sequences: Sequence[TokenSequence]
    scored: Mapping[str, Sequence[ScoredSequence]]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    sequences: list[TokenSequence]
    answers: dict[str, Future[dict[str, ScoredSequence]]]


class LabelPrefetcher:
    """Asks sources of labels, by their teachers' names, for batches in the background and hands each over when its
    step comes.

    What goes wrong there is raised by ``take``; ``waited_seconds`` counts the time that ``take`` waits, ``taken`` the
    sequences that it handed over and ``taken_from_cache`` those whose labels had been computed before.
    Leaving it as a context closes the sources, which ends the requests under way.
    """

    def __init__(
        self,
        sources: Mapping[str, LabelSource],
        *,
        options: LabelOptions,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.waited_seconds = 0.0
        self.taken = self.taken_from_cache = 0
        self._sources = sources
        self._options = options
        self._should_stop = should_stop
        self._threads = ThreadPoolExecutor(REQUESTS_AT_ONCE * len(sources), thread_name_prefix="labels")
        self._asked: dict[int, _Asked] = {}
        self._tickets = itertools.count()

    def __enter__(self) -> "LabelPrefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the requests under way and the threads that make them."""
        for source in self._sources.values():
            source.close()
        self._threads.shutdown(cancel_futures=True)

    def request(self, examples: Sequence[Example]) -> int:
        """Ask for a batch; returns the ticket that ``take`` wants."""
        ticket = next(self._tickets)
        # A record may be under way twice: at the end of one epoch and the start of the next, or to fill up a batch.
        sequences = [
            label_request(example, id=f"record {example.index}, batch {ticket}.{place}")
            for place, example in enumerate(examples)
        ]
        answers = {
            # In the context of whoever asks, so that the request belongs to its trace.
            teacher: self._threads.submit(contextvars.copy_context().run, self._score, teacher, sequences)
            for teacher in self._sources
        }
        self._asked[ticket] = _Asked(sequences=sequences, answers=answers)
        return ticket

    def take(self, ticket: int) -> BatchLabels:
        """The labels of the batch, once. CancelledError when the run is to stop meanwhile.

        LabelMismatchError for full labels, and top-k labels at temperature 1, that do not fit what the teacher tells of
        the actual tokens; exact ones are for ``require_aligned``, and of others nothing more than their hash is known.
        """
        asked = self._asked.pop(ticket)
        started = time.monotonic()
        try:
            answered = {teacher: self._wait(answer) for teacher, answer in asked.answers.items()}
        finally:
            self.waited_seconds += time.monotonic() - started
        batches = {
            teacher: [scored[sequence.id] for sequence in asked.sequences] for teacher, scored in answered.items()
        }
        self.taken += sum(map(len, batches.values()))
        self.taken_from_cache += sum(part.from_cache for batch in batches.values() for part in batch)
        return BatchLabels(sequences=asked.sequences, scored=batches)

    def _wait(self, answer: Future[dict[str, ScoredSequence]]) -> dict[str, ScoredSequence]:
        while True:
            try:
                return answer.result(timeout=0.2)
            except TimeoutError:
                if answer.done():
                    raise
                if self._should_stop():
                    raise CancelledError("stopped while waiting for the teacher's labels") from None

    def _score(self, teacher: str, sequences: list[TokenSequence]) -> dict[str, ScoredSequence]:
        with blaming_teacher(teacher):
            answered = {scored.id: scored for scored in self._sources[teacher].score(sequences, self._options)}
            # Exact labels are compared where the teacher's head is: batch_alignment.py.
            if self._options.encoding != "exact":
                for sequence in sequences:
                    verify_token_logprobs(answered[sequence.id], sequence, temperature=self._options.temperature)
        return answered


def label_request(example: Example, *, id: str) -> TokenSequence:
    """What to ask for an example: its tokens, labelled where its response stands; or the teacher's reading of it."""
    if example.reading is not None:
        return TokenSequence(
            id=id, token_ids=example.reading.token_ids, label_positions=example.reading.label_positions
        )
    return TokenSequence(id=id, token_ids=example.token_ids, label_positions=example.response_positions)


def soft_targets(labels: Sequence[SoftLabels], *, teacher_head: OutputHead | None, device: torch.device) -> SoftTargets:
    """The labels of a batch, joined along N in the batch's order, on the student's device."""
    if isinstance(labels[0], ExactLabels):
        assert teacher_head is not None, "exact labels need the teacher's head"
        exact = _all_of(ExactLabels, labels)
        return ExactTargets(hidden_NE=_join([part.hidden_ND for part in exact], device), head=teacher_head)
    if isinstance(labels[0], TopKLabels):
        top_k = _all_of(TopKLabels, labels)
        return TopKTargets(
            ids_NK=_join([part.ids_NK for part in top_k], device).long(),
            logprobs_NK=_join([part.logprobs_NK for part in top_k], device),
            tail_mass_N=_join([part.tail_mass_N for part in top_k], device),
        )
    if isinstance(labels[0], SampledLabels):
        return _sampled_targets(_all_of(SampledLabels, labels), device)
    if isinstance(labels[0], ProjectedLabels):
        projected = _all_of(ProjectedLabels, labels)
        biases = [part.bias_N for part in projected if part.bias_N is not None]
        return ProjectedTargets(
            embedding_ND=_join([part.embedding_NS for part in projected], device),
            bias_N=_join(biases, device) if biases else None,
        )
    full = _all_of(FullLabels, labels)
    return FullTargets(logprobs_NV=_join([part.logprobs_NV for part in full], device))


def mixed_targets(parts: Sequence[SoftTargets], *, weights: Sequence[float]) -> SoftTargets:
    """A batch's labels by several teachers, averaged by ``weights``; those of one teacher as they are."""
    if len(parts) == 1:
        return parts[0]
    whole = [part for part in parts if isinstance(part, ExactTargets | FullTargets)]
    assert len(whole) == len(parts), "the specification allows no others"
    return MixedTargets(parts=whole, weights=weights)


def universal_targets(targets: SoftTargets, examples: Sequence[Example]) -> UniversalTargets:
    """A batch's labels by a teacher with another tokenizer, at the response tokens that they belong to."""
    assert isinstance(targets, ExactTargets | FullTargets | TopKTargets), "the specification allows no others"
    rows, before = [], 0
    for example in examples:
        assert example.reading is not None
        rows += [before + place for place in example.reading.response_places]
        before += len(example.response_positions)
    return UniversalTargets(labels=targets, rows=rows)


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor of the same type, bfloat16 included. The array must be writable, or a copy that nobody else holds."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> Array:
    """The reverse of ``as_tensor``, from any device."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def _sampled_targets(labels: Sequence[SampledLabels], device: torch.device) -> SampledTargets:
    lengths_N = np.concatenate([part.lengths_N for part in labels]).astype(np.int64)
    counts_M = np.concatenate([part.counts_M for part in labels]).astype(np.float32)
    offsets = np.concatenate([[0], lengths_N.cumsum()])
    rows_M = np.repeat(np.arange(len(lengths_N)), lengths_N)
    draws_N = np.bincount(rows_M, weights=counts_M, minlength=len(lengths_N))
    return SampledTargets(
        ids_M=_join([part.ids_M for part in labels], device).long(),
        weights_M=torch.from_numpy((counts_M / draws_N[rows_M]).astype(np.float32)).to(device, non_blocking=True),
        offsets=offsets.tolist(),
    )


Labels = TypeVar("Labels", ExactLabels, TopKLabels, FullLabels, SampledLabels, ProjectedLabels)


def _all_of(kind: type[Labels], labels: Sequence[SoftLabels]) -> list[Labels]:
    chosen = [part for part in labels if isinstance(part, kind)]
    assert len(chosen) == len(labels), "a batch has labels of one encoding"
    return chosen


def _join(arrays: Sequence[Array], device: torch.device) -> torch.Tensor:
    return as_tensor(np.concatenate(arrays)).to(device, non_blocking=True)
