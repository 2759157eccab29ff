"""Where soft labels come from: a teacher that serves, or files of labels that one has made."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import ScoredSequence


class LabelSource(Protocol):
    """Safe to share between threads; whoever has it closes it."""

    def score(
        self, sequences: Iterable[TokenSequence], options: LabelOptions | None = None
    ) -> Iterator[ScoredSequence]:
        """Labels of every sequence, each once, in any order; checked to belong to its tokens."""

    def use_student_head(self, head: LmHead) -> str:
        """Projected labels are means of this head; returns its fingerprint for ``LabelOptions.student_head``."""

    def close(self) -> None:
        """End what is under way."""
