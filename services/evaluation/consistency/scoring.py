"""What the network makes of claims: how likely each word, and the claim, is unsupported."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.evaluation.consistency.batching import EncodedClaim, by_length, make_batch
from services.evaluation.consistency.claims import Claim
from services.evaluation.consistency.network import ConsistencyNetwork

LARGEST = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class ClaimScore:
    """Probabilities that words (W), and the claim as a whole, are unsupported."""

    words_W: npt.NDArray[np.float64]
    claim: float


@torch.no_grad()
def score_claims(
    network: ConsistencyNetwork, claims: Sequence[EncodedClaim], *, batch_size: int = 32
) -> list[ClaimScore]:
    network.eval()
    scores: list[ClaimScore | None] = [None] * len(claims)
    for indices in by_length(claims, size=batch_size):
        word_logits_BW, claim_logits_B = network(make_batch([claims[index] for index in indices]))
        # A claim is as wrong as its worst word and as the claim head say together; each alone agrees less with people.
        logits_B = (claim_logits_B + word_logits_BW.amax(1)).double() / 2
        words_BW = torch.sigmoid(word_logits_BW.double()).numpy()
        for row, (index, probability) in enumerate(zip(indices, torch.sigmoid(logits_B).tolist(), strict=True)):
            scores[index] = ClaimScore(words_BW[row, : len(claims[index].claim.words)], probability)
    return [score for score in scores if score is not None]


def output_score(judged: Iterable[tuple[Claim, ClaimScore]]) -> float | None:
    """Probability that at least one claim is unsupported, taken as independent; None without claims.

    A claim in the same words counts once: models that loop say one thing often.
    """
    worst: dict[tuple[str, ...], float] = {}
    for claim, score in judged:
        words = tuple(word.key for word in claim.words)
        worst[words] = max(score.claim, worst.get(words, 0.0))
    if not worst:
        return None
    return float(-np.expm1(sum(np.log1p(-min(probability, LARGEST)) for probability in worst.values())))
