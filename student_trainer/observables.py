"""What is logged of the student besides its loss: sums over the response tokens since the last log."""

from collections.abc import Sequence

import torch

from student_trainer.chunk_loss import OBSERVED
from student_trainer.loss import LossSums


class Observables:
    """``sums`` [tokens, OBSERVED ...] stays on the device; ranks add theirs up before ``means``."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(1 + len(OBSERVED), dtype=torch.float64, device=device)
        self._told: set[str] = set()

    def add(self, sums: LossSums) -> None:
        """Nothing is added where the loss was not asked to observe."""
        if sums.observed:
            self._told.update(sums.observed)
            self.sums[0] += sums.tokens
            for place, name in enumerate(OBSERVED, start=1):
                if name in sums.observed:
                    self.sums[place] += sums.observed[name]

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """By name, of those that the labels could tell; ``sums`` are all ranks', which start anew here."""
        tokens, *totals = sums
        means = {name: total / tokens for name, total in zip(OBSERVED, totals, strict=True) if name in self._told}
        self.sums.zero_()
        self._told.clear()
        return means
