"""Logits that are no numbers: damaged weights or an overflow give NaN, and decoding would go on as if it were a word.

Shapes: B sequences, V vocabulary.
"""

import torch
from transformers import LogitsProcessor

from services.contract.errors import EvaluationError


class FiniteLogits(LogitsProcessor):
    """For ``generate``: EvaluationError at logits from which no token follows. -inf rules a token out and is fine."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits_BV = scores
        # Neither NaN nor inf is below inf.
        if not (logits_BV < torch.inf).all():
            raise not_finite("logits")
        return logits_BV


def not_finite(what: str) -> EvaluationError:
    """``what`` the model computes: logits, likelihoods, attention."""
    return EvaluationError(
        f"the model's {what} are not finite",
        fix="Check its weights for NaN; after an overflow, train or save it in bfloat16 or float32.",
    )
