"""Weights that were served before: what is in the label cache of theirs can be had, and nothing else."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from services.contract.errors import HandshakeError
from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ScoredSequence
from services.contract.tensors import Array
from teacher_server.engine import BatchReport, Capacity, Engine, TeacherCard
from teacher_server.student_heads import StudentHeads


class FormerEngine:
    """An Engine that computes nothing: HandshakeError names what ``current`` gives instead."""

    def __init__(self, engine: Engine, *, current: Callable[[], Engine]) -> None:
        self._capacities = engine.score_capacity, engine.decode_capacity
        self._card = engine.describe()
        self._current = current

    @property
    def score_capacity(self) -> Capacity:
        return self._capacities[0]

    @property
    def decode_capacity(self) -> Capacity:
        return self._capacities[1]

    @property
    def student_heads(self) -> StudentHeads[Any]:
        return self._current().student_heads

    def describe(self) -> TeacherCard:
        return self._card

    def lm_head(self) -> LmHead:
        self._refuse()

    def tokenize(self, text: str) -> list[int]:
        self._refuse()

    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        self._refuse()

    async def score(self, sequence: TokenSequence, options: LabelOptions) -> ScoredSequence:
        self._refuse()

    async def generate(self, prompt: Prompt, options: DecodeOptions) -> Continuation:
        self._refuse()

    def watch_batches(self, report: BatchReport) -> None:
        """There are none."""

    def close(self) -> None:
        pass

    def _refuse(self) -> NoReturn:
        card = self._current().describe()
        raise HandshakeError(
            f"this teacher serves {card.model} (fingerprint {card.fingerprint}) by now, no longer {self._card.model} "
            f"(fingerprint {self._card.fingerprint})",
            fix="Have the former weights loaded again, or start the run again.",
            details={"served": card.fingerprint, "asked": self._card.fingerprint},
        )
