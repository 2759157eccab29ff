"""What people say of outputs: the spans that they hold to be unsupported by the source."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from services.contract.records import Record

MAX_SPANS = 1000


def _storable(text: str) -> str:
    # PostgreSQL keeps none.
    if "\0" in text:
        raise ValueError("should have no NUL character")
    return text


Storable = AfterValidator(_storable)


class MarkedSpan(Record):
    """Characters [start, end) of an output."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(gt=0)]

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"the span [{self.start}, {self.end}) holds no character")
        return self


class NewAnnotation(Record):
    """One person's judgement of one output; no span at all says that all of it is supported."""

    benchmark: Annotated[str, StringConstraints(min_length=1, max_length=100), Storable]
    item_id: Annotated[str, StringConstraints(min_length=1, max_length=500), Storable]
    annotator: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), Storable]
    spans: Annotated[list[MarkedSpan], Field(max_length=MAX_SPANS)]


class Annotation(NewAnnotation):
    """A judgement as it is stored; a later one of the same person on the same output replaces it."""

    run_id: str
    written_at: datetime


class AnnotationList(Record):
    items: list[Annotation]


class AnnotatorAgreement(Record):
    """Krippendorff's alpha over words, marked or not: 1 is perfect, 0 is what chance gives.

    None, with the reason in ``missing``, where it is not defined.
    """

    alpha: float | None
    missing: str | None = None
    annotators: dict[str, int] = Field(description="Outputs that each person has judged.")
    outputs: int = Field(description="Outputs that somebody has judged.")
    shared: int = Field(description="Outputs that two or more people have judged.")
    words: int = Field(description="Words of the shared outputs.")
