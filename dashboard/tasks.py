"""What there is to annotate: outputs of students, each with a detector's marks as a proposal."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from services.contract.annotation_records import NewAnnotation
from services.contract.records import CaseOutput, CaseStudy, Span
from services.reports.annotation import spans_of_words, words_of
from services.reports.detectors import detectors_of, marked_by

Key = tuple[str, str, str]
"""Run, benchmark and item."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One output to judge; ``study`` has the source and the other outputs."""

    study: CaseStudy
    output: CaseOutput

    @property
    def key(self) -> Key:
        return self.output.run_id, self.study.benchmark, self.study.item_id


def tasks_of(study: CaseStudy) -> list[Task]:
    """The study's outputs that say something, in an order that does not tell which method wrote which."""
    outputs = [output for output in study.outputs if output.output.strip()]
    shuffled = sorted(outputs, key=lambda output: hashlib.sha256(f"{study.item_id} {output.run_id}".encode()).digest())
    return [Task(study=study, output=output) for output in shuffled]


def proposal(task: Task) -> list[Span]:
    """The output's spans of the first detector that marked anything in this item's outputs."""
    detectors = detectors_of(task.study)
    if not detectors:
        return []
    of_one = marked_by(task.study, detectors[0])
    return next(output.spans for output in of_one.outputs if output.run_id == task.output.run_id)


def judgement(task: Task, *, annotator: str, marked: Sequence[int]) -> NewAnnotation:
    """What to keep of a person who marked these words, by place."""
    return NewAnnotation(
        benchmark=task.study.benchmark,
        item_id=task.study.item_id,
        annotator=annotator,
        spans=spans_of_words(words_of(task.output.output), marked),
    )
