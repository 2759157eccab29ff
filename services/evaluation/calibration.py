"""Whether a model knows what it does not know: its confidence in right and in wrong answers.

Legend of shapes: N questions, C choices of one of them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from services.contract.records import Record

BINS = 15
Array = NDArray[np.float64]


class Bin(Record):
    """Questions whose confidence lies in one of the bins of equal width."""

    confidence: float = Field(description="Mean over the bin, 0 to 1.")
    accuracy: float
    items: int


class Calibration(Record):
    """All means are over questions; likelihoods are natural logarithms.

    ``ece``, 0 to 1, is the expected calibration error over 15 bins of equal width (Guo et al., 2017, eq. 3);
    ``bins`` holds those that are not empty, for a reliability diagram. ``wrong_nll`` is the negative log-likelihood
    of wrong answers (Nguyen et al., 2025, appendix A): higher is less sure of what is false.
    """

    items: int
    accuracy: float
    confidence: float
    ece: float
    entropy: float = Field(description="Of the choices' probabilities, in nats.")
    wrong_nll: float
    bins: list[Bin]


def measure_calibration(likelihoods: Sequence[Sequence[float]], right: Sequence[int]) -> Calibration:
    """From each question's log-likelihood per choice, and the place of the right one.

    A choice's probability is its share among the choices; the most probable is the prediction, ties going to the
    first.
    """
    assert likelihoods, "a mean needs at least one question"
    probabilities = [choice_probabilities(of_item) for of_item in likelihoods]
    confidence_N = np.array([of_item.max() for of_item in probabilities])
    correct_N = np.array([int(of_item.argmax()) == place for of_item, place in zip(probabilities, right, strict=True)])
    bins = reliability_bins(confidence_N, correct_N)
    return Calibration(
        items=len(likelihoods),
        accuracy=float(correct_N.mean()),
        confidence=float(confidence_N.mean()),
        ece=sum(one.items * abs(one.accuracy - one.confidence) for one in bins) / len(likelihoods),
        entropy=float(np.mean([entropy(of_item) for of_item in probabilities])),
        wrong_nll=float(np.mean([wrong_nll(*pair).mean() for pair in zip(likelihoods, right, strict=True)])),
        bins=bins,
    )


def choice_probabilities(likelihoods: Sequence[float]) -> Array:
    """(C,), in float64: each choice's share of the probability that all of them have."""
    likelihood_C = np.asarray(likelihoods, dtype=np.float64)
    share_C = np.exp(likelihood_C - likelihood_C.max())
    return np.asarray(share_C / share_C.sum(), dtype=np.float64)


def entropy(probability_C: Array) -> float:
    """In nats; 0 for certainty, log C for none at all."""
    positive = probability_C[probability_C > 0]
    return float(-(positive * np.log(positive)).sum())


def wrong_nll(likelihoods: Sequence[float], right: int) -> Array:
    """(C - 1,): the negative log-likelihood of every wrong choice, in nats, over the whole vocabulary."""
    return -np.delete(np.asarray(likelihoods, dtype=np.float64), right)


def reliability_bins(confidence_N: Array, correct_N: NDArray[np.bool_]) -> list[Bin]:
    """The bins ((i - 1)/15, i/15] that hold a question; confidence 0 belongs to the first."""
    place_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        Bin(
            confidence=float(confidence_N[place_N == place].mean()),
            accuracy=float(correct_N[place_N == place].mean()),
            items=int((place_N == place).sum()),
        )
        for place in range(BINS)
        if (place_N == place).any()
    ]
