"""A served teacher that goes wrong in mid-run: every hash is right, but the labels are those of the next position."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.contract.errors import LabelMismatchError
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import ExactLabels, FullLabels, ScoredSequence, SoftLabels, TopKLabels
from student_trainer.teacher_client import TeacherClient

WHOLE_BATCHES = 8
"""Two steps of four records: what comes before the first wrong answer, whichever way answers overtake each other."""
ENCODINGS = {name: {"encoding": name} for name in ("exact", "full")} | {"top_k": {"encoding": "top_k", "k": 40}}
"""Labels that can be compared with what the teacher tells of the tokens."""


def go_wrong(monkeypatch: pytest.MonkeyPatch, *, at: str) -> None:
    """From now on the teacher at an address misaligns all batches but a run's first ones; others stay right."""
    plain = TeacherClient.score

    def score(
        self: TeacherClient, sequences: list[TokenSequence], options: LabelOptions | None = None
    ) -> Iterator[ScoredSequence]:
        for scored in plain(self, sequences, options):
            batch = re.search(r"batch (\d+)", scored.id)
            wrong = self.address == at and batch and int(batch[1]) >= WHOLE_BATCHES
            yield replace(scored, labels=_shifted(scored.labels)) if wrong else scored

    monkeypatch.setattr(TeacherClient, "score", score)


@contextmanager
def stopped(directory: Path, *, teacher: Path) -> Iterator[None]:
    """Within it a run in ``directory`` is stopped for the labels of this teacher, though they were right at first."""
    with pytest.raises(LabelMismatchError, match=r"'record \d, batch .*log-probability that differs") as caught:
        yield
    assert caught.value.what.startswith(f"of the teacher {teacher}: ")
    assert any((directory / "checkpoints").iterdir())
    assert not (directory / "model").exists()


def _shifted(labels: SoftLabels) -> SoftLabels:
    if isinstance(labels, ExactLabels):
        return ExactLabels(hidden_ND=np.roll(labels.hidden_ND, 1, axis=0))
    if isinstance(labels, FullLabels):
        return FullLabels(logprobs_NV=np.roll(labels.logprobs_NV, 1, axis=0))
    assert isinstance(labels, TopKLabels)
    parts = {name: np.roll(getattr(labels, name), 1, axis=0) for name in ("ids_NK", "logprobs_NK", "tail_mass_N")}
    return TopKLabels(**parts)
