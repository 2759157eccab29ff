"""What the server asks of an engine, and what an engine tells about its model. Engines differ in what computes."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import Array, ScoredSequence

MAX_K = 1024
"""Largest k of top-k labels."""


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


class Engine(Protocol):
    """A teacher that computes. Requests reach it validated; many are under way at once and share its batches.

    Closing an iterator (``aclose``) frees what it still had to compute.
    """

    def describe(self) -> TeacherCard: ...

    def lm_head(self) -> LmHead:
        """The output head without padding rows, in the model's own type."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids without special tokens around them."""
        ...

    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        """The model's own logits after each token, [T, vocab_size], by another way than ``score`` takes. Blocks."""
        ...

    def score(self, sequences: Sequence[TokenSequence], options: LabelOptions) -> AsyncGenerator[ScoredSequence, None]:
        """Labels as they come; exact ones in the precision in which they were computed."""
        ...

    def generate(self, prompts: Sequence[Prompt], options: DecodeOptions) -> AsyncGenerator[Continuation, None]:
        """Continuations as each finishes."""
        ...

    def close(self) -> None:
        """Stop computing and let go of threads; requests under way end in an error."""
        ...
