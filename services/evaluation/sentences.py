"""Sentences of an output that a judge of whole sentences holds to be unsupported, as spans."""

from collections.abc import Callable, Sequence

from services.contract.records import Span

THRESHOLD = 0.5
"""Sentences whose probability of being supported is lower become spans."""


def sentence_spans(
    sentences: Sequence[tuple[int, int]],
    supported: Sequence[float],
    *,
    detector: str,
    explain: Callable[[int], str],
) -> list[Span]:
    """``supported``: each sentence's probability, 0 to 1; ``explain``: what to say of the sentence of an index."""
    return [
        Span(
            start=start,
            end=end,
            detector=detector,
            kind="sentence",
            score=min(max(1 - probability, 0.0), 1.0),
            explanation=explain(index),
        )
        for index, ((start, end), probability) in enumerate(zip(sentences, supported, strict=True))
        if probability < THRESHOLD
    ]
