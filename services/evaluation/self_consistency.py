"""Self-consistency over sampled outputs: what a model makes up, it does not make up twice (SelfCheckGPT, Manakul 2023).

Each sentence of an output is judged against each sampled output as if that were its source; a fact that the samples
do not share is likely invented. The judge is the embedded consistency model.
"""

from collections.abc import Sequence
from statistics import fmean

from services.evaluation.answering import Answer, draw_samples
from services.evaluation.consistency.detector import Detector
from services.evaluation.consistency.text import split_sentences
from services.evaluation.model import LoadedModel
from services.evaluation.sentences import sentence_spans
from services.evaluation.verdict import Verdict

DETECTOR = "self_consistency"


class SelfConsistency:
    """Draws ``samples`` further outputs for each answer and compares."""

    def __init__(self, detector: Detector, *, loaded: LoadedModel, samples: int, max_new_tokens: int) -> None:
        self._detector = detector
        self._loaded = loaded
        self._samples = samples
        self._max_new_tokens = max_new_tokens

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        return [self._judge(answer) for answer in answers]

    def _judge(self, answer: Answer) -> Verdict:
        if not split_sentences(answer.output):
            return Verdict(score=None)
        drawn = draw_samples(answer, loaded=self._loaded, max_new_tokens=self._max_new_tokens, count=self._samples)
        return compare(answer.output, drawn, detector=self._detector)


def compare(output: str, samples: Sequence[str], *, detector: Detector) -> Verdict:
    """Mean over sentences of the mean over samples of the probability, x 100, that the sample supports the sentence."""
    sentences = split_sentences(output)
    detections = detector.detect([(sample, output[start:end]) for start, end in sentences for sample in samples])
    judged = iter(detections)
    supported = []
    kept = []
    for sentence in sentences:
        unsupported = [one.score for one in (next(judged) for _ in samples) if one.score is not None]
        if unsupported:
            kept.append(sentence)
            supported.append(1 - fmean(unsupported))
    if not supported:
        return Verdict(score=None)
    spans = sentence_spans(
        kept,
        supported,
        detector=DETECTOR,
        explain=lambda index: (
            f"{len(samples)} other outputs for the same article support this with {supported[index]:.0%} on average."
        ),
    )
    return Verdict(score=100 * fmean(supported), spans=spans)
