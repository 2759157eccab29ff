"""The embedded consistency detector: marks what an output says beyond, or against, its source. It needs no model hub.

It reads an output sentence by sentence beside the source sentences that support each best, with the MiniLM sentence
encoder and a small network trained by ``services.evaluation.consistency.train``, both shipped with the package. English
only; scores are those of news summaries.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from services.contract.records import Span
from services.evaluation.consistency.batching import EncodedClaim, encode_pairs
from services.evaluation.consistency.encoding import Encoder
from services.evaluation.consistency.network import ConsistencyNetwork
from services.evaluation.consistency.scoring import ClaimScore, output_score, score_claims
from services.evaluation.consistency.text import Word
from services.evaluation.consistency.weights import SHIPPED, read_model

DETECTOR = "consistency"
PAIRS_AT_A_TIME = 64
LONGEST_QUOTE = 160


class Detection(NamedTuple):
    """``score``: the probability that the output holds something unsupported; None where there is nothing to judge."""

    score: float | None
    spans: list[Span]


def detect_consistency(pairs: Sequence[tuple[str, str]], *, weights: Path = SHIPPED) -> list[Detection]:
    """One detection for each (document, output), in order.

    An output without words has the score None and no spans; beside a document without words everything is
    unsupported. ``weights`` is a folder that training wrote. A pair's result does not depend on the other pairs
    beyond rounding.
    """
    detector = load_detector(weights)
    return [
        detection
        for start in range(0, len(pairs), PAIRS_AT_A_TIME)
        for detection in detector.detect(pairs[start : start + PAIRS_AT_A_TIME])
    ]


@functools.cache
def load_detector(weights: Path = SHIPPED) -> "Detector":
    """The detector with the encoder loaded, once per process. InvalidInputError for a folder without its files."""
    network, encoder, card = read_model(weights)
    return Detector(network, encoder=encoder, word_threshold=float(card["word_threshold"]))


class Detector:
    """A network with its encoder. Words above ``word_threshold`` become spans."""

    def __init__(self, network: ConsistencyNetwork, *, encoder: Encoder, word_threshold: float) -> None:
        self.network = network
        self.encoder = encoder
        self.word_threshold = word_threshold

    def detect(self, pairs: Sequence[tuple[str, str]]) -> list[Detection]:
        encoded = encode_pairs(pairs, encoder=self.encoder)
        claims = [[claim for claim in found if claim.claim.words] for found in encoded]
        scores = iter(score_claims(self.network, [claim for found in claims for claim in found]))
        detections = []
        for found in claims:
            judged = [(claim, next(scores)) for claim in found]
            spans = [span for claim, score in judged for span in self._spans(claim, score)]
            detections.append(Detection(output_score((item.claim, score) for item, score in judged), spans))
        return detections

    def _spans(self, claim: EncodedClaim, score: ClaimScore) -> list[Span]:
        start = claim.claim.start
        explanation = _explain(claim)
        return [
            Span(
                start=start + words[0].start,
                end=start + words[-1].end,
                detector=DETECTOR,
                kind=_kind(words, sentence_start=claim.claim.words[0]),
                score=probability,
                explanation=explanation,
            )
            for words, probability in _runs(claim.claim.words, score.words_W, self.word_threshold)
        ]


def _runs(
    words: list[Word], probabilities_W: npt.NDArray[np.float64], threshold: float
) -> list[tuple[list[Word], float]]:
    """Maximal runs of words above the threshold with their highest probability; a stop word alone makes none."""
    runs = []
    run: list[int] = []
    for index in range(len(words) + 1):
        if index < len(words) and probabilities_W[index] >= threshold:
            run.append(index)
        elif run:
            if any(not words[place].is_stop_word for place in run):
                runs.append(([words[place] for place in run], float(probabilities_W[run].max())))
            run = []
    return runs


def _kind(words: list[Word], *, sentence_start: Word) -> str:
    if any(word.is_number for word in words):
        return "number"
    if any(word.is_capitalised and word is not sentence_start for word in words):
        return "entity"
    return "word"


def _explain(claim: EncodedClaim) -> str:
    """Quotes the source sentence that supports the claim best, because that is where a reader should look."""
    if not claim.claim.nearest:
        return "The source is empty."
    quote = " ".join(claim.claim.nearest.split())
    quote = quote if len(quote) <= LONGEST_QUOTE else quote[: LONGEST_QUOTE - 1].rsplit(" ", 1)[0] + "…"
    return f"Not supported by the source, whose nearest sentence is: {quote}"
