"""Which detectors marked a case study's outputs, and how far they agree."""

from collections.abc import Sequence
from itertools import combinations

from services.contract.metric_words import DETECTORS, metric_title
from services.contract.records import CaseOutput, CaseStudy, Span

Pair = tuple[str, str]


def detectors_of(study: CaseStudy) -> list[str]:
    """Those that marked something in one of the outputs, those of DETECTORS first and in its order."""
    found = {span.detector for output in study.outputs for span in output.spans}
    return [*(name for name in DETECTORS if name in found), *sorted(found - set(DETECTORS))]


def marked_by(study: CaseStudy, detector: str) -> CaseStudy:
    """The study with this detector's spans alone."""
    outputs = [
        output.model_copy(update={"spans": [span for span in output.spans if span.detector == detector]})
        for output in study.outputs
    ]
    return study.model_copy(update={"outputs": outputs})


def marked_by_first(study: CaseStudy) -> CaseStudy:
    """The study with the spans of the first of its detectors: those of all together would mark too much."""
    detectors = detectors_of(study)
    return marked_by(study, detectors[0]) if len(detectors) > 1 else study


def agreement(outputs: Sequence[CaseOutput], detectors: Sequence[str]) -> dict[Pair, float]:
    """For each pair of detectors, the share of the outputs' characters that both mark or neither, 0 to 1."""
    marks = {
        name: [
            covered
            for output in outputs
            for covered in covered_characters(
                len(output.output), [span for span in output.spans if span.detector == name]
            )
        ]
        for name in detectors
    }
    characters = sum(len(output.output) for output in outputs)
    if not characters:
        return {}
    return {
        (one, other): sum(a == b for a, b in zip(marks[one], marks[other], strict=True)) / characters
        for one, other in combinations(detectors, 2)
    }


def agreement_text(study: CaseStudy) -> str:
    """A sentence on the detectors of a case study; empty where fewer than two judged it, or none marked anything."""
    marking = detectors_of(study)
    # Whoever marked nothing in outputs that it judged agrees with all that is left unmarked.
    silent = [name for name in DETECTORS if name not in marking and _has_judged(study, name)]
    alike = ", ".join(
        f"{detector_title(one)} and {detector_title(other)} {share:.0%}"
        for (one, other), share in agreement(study.outputs, [*marking, *silent] if marking else []).items()
    )
    return f"Of these outputs' characters, both mark or neither marks: {alike}." if alike else ""


def _has_judged(study: CaseStudy, detector: str) -> bool:
    return all(DETECTORS[detector] in output.scores for output in study.outputs)


def detector_title(name: str) -> str:
    """A detector goes by the name of its metric."""
    return metric_title(DETECTORS.get(name, name))


def covered_characters(length: int, spans: Sequence[Span]) -> list[bool]:
    """For each character of a text whether a span covers it."""
    covered = [False] * length
    for span in spans:
        for place in range(span.start, min(span.end, length)):
            covered[place] = True
    return covered
