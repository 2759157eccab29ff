"""What the server asks of an engine, and what an engine tells about its model. Engines differ in what computes."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.contract.errors import TeacherError
from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ScoredSequence
from services.contract.tensors import Array
from teacher_server.student_heads import StudentHeads

ENGINE_FAILED = signal.SIGUSR1
"""What an engine sends its own process when only a new one can compute again: the server drains and fails."""

MAX_K = 1024
"""Largest k of top-k labels."""
MAX_DRAWS = 1024
"""Most draws per position of sampled labels."""


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """The model an engine serves.

    ``vocab_size`` is the tokenizer's highest id plus 1; rows of the head beyond it are padding. ``max_length`` is in
    tokens. ``special_token_ids`` by role (bos, eos, unk, pad). ``stop_token_ids`` end a continuation by default.
    ``weights_dtype`` names the type the weights are held in.
    """

    engine: str
    model: str
    revision: str
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    hidden_size: int
    max_length: int
    generates: bool
    special_token_ids: Mapping[str, int]
    stop_token_ids: tuple[int, ...]
    weights_dtype: str


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How much an engine can use at a time: what it computes and what it chooses its next batches from.

    ``tokens`` of a sequence are its own; of a prompt its own and those it may be continued by.
    """

    sequences: int
    tokens: int


class BatchReport(Protocol):
    """Learns what a batch held; ``tokens`` without padding."""

    def __call__(self, *, sequences: int, tokens: int) -> None: ...


class Engine(Protocol):
    """A teacher that computes, one sequence or prompt per call.

    Calls reach it validated; many are awaited at once, and which of them share a batch is the engine's business.
    Cancelling the awaiting task frees the work: what waits is dropped, a decode stops at its next step. An error of
    one call concerns that call alone.
    """

    @property
    def score_capacity(self) -> Capacity: ...

    @property
    def decode_capacity(self) -> Capacity: ...

    def describe(self) -> TeacherCard: ...

    def lm_head(self) -> LmHead:
        """The output head without padding rows, in the model's own type."""
        ...

    @property
    def student_heads(self) -> StudentHeads[Any]:
        """The students' heads that projected labels need."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids without special tokens around them."""
        ...

    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        """The model's own logits after each token, [T, vocab_size], by another way than ``score`` takes. Blocks."""
        ...

    async def score(self, sequence: TokenSequence, options: LabelOptions) -> ScoredSequence:
        """Labels of one sequence; exact ones in the precision in which they were computed."""
        ...

    async def generate(self, prompt: Prompt, options: DecodeOptions) -> Continuation:
        """The continuation of one prompt."""
        ...

    def watch_batches(self, report: BatchReport) -> None:
        """Call ``report`` after each batch, from any thread; an engine that does not see its batches never does."""
        ...

    def close(self) -> None:
        """Stop computing and let go of threads; requests under way end in an error."""
        ...


def logits_not_finite() -> TeacherError:
    """What an engine or its caller raises for a sequence whose logits hold NaN; others may still be right."""
    return TeacherError(
        "the teacher's logits are not finite",
        fix="The weights are damaged, or overflow in this precision: try --dtype bfloat16 or float32.",
    )
