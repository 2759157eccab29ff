"""How well a student knows what it knows, on records that it does not learn: next tokens of their responses.

Shape suffixes: B sequences, T tokens, N response tokens, C positions of one chunk, V vocabulary, K bins.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from student_trainer.data import Collate, Example, collate, model_inputs
from student_trainer.output_head import OutputHead, output_logits
from student_trainer.student import loss_at_head

BINS = 15
CHUNK = 256


class Calibration:
    """Counts over tokens, in 15 bins of equal width by the probability of the likeliest token."""

    def __init__(self, device: torch.device) -> None:
        self._tokens_K, self._confidence_K, self._correct_K, self._nll_K = torch.zeros(
            4, BINS, dtype=torch.float64, device=device
        )

    def add(self, logits_CV: Tensor, ids_C: Tensor) -> None:
        """Positions with their logits and the tokens that stand there."""
        logprobs_CV = logits_CV.log_softmax(dim=1)
        best = logprobs_CV.max(dim=1)
        confidence_C = best.values.exp().double()
        bin_C = (confidence_C * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
        self._tokens_K.index_add_(0, bin_C, torch.ones_like(confidence_C))
        self._confidence_K.index_add_(0, bin_C, confidence_C)
        self._correct_K.index_add_(0, bin_C, (best.indices == ids_C).double())
        self._nll_K.index_add_(0, bin_C, -logprobs_CV.gather(1, ids_C.unsqueeze(1)).squeeze(1).double())

    def metrics(self) -> dict[str, float]:
        """``held_out_loss`` in nats per token, ``held_out_accuracy``, and ``held_out_ece``, the expected calibration
        error (Guo et al. 2017, equation 3), both 0 to 1.
        """
        tokens = self._tokens_K.sum()
        return {
            "held_out_loss": (self._nll_K.sum() / tokens).item(),
            "held_out_accuracy": (self._correct_K.sum() / tokens).item(),
            "held_out_ece": ((self._correct_K - self._confidence_K).abs().sum() / tokens).item(),
        }


def measure_held_out(
    model: torch.nn.Module,
    *,
    head_layer: torch.nn.Module,
    head: Callable[[], OutputHead],
    examples: Sequence[Example],
    vocab_size: int,
    batch_size: int,
    device: torch.device,
    collate: Collate = collate,
) -> dict[str, float]:
    """``Calibration.metrics`` over the response tokens of ``examples``, without a gradient and without dropout.

    ``model`` may be wrapped and ``head`` is called within its forward pass; of several processes each measures all.
    """
    calibration = Calibration(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = {name: tensor.to(device) for name, tensor in collate(examples[start : start + batch_size]).items()}

            def count(hidden_BTD: Tensor, batch: dict[str, Tensor] = batch) -> Tensor:
                hidden_ND = hidden_BTD.flatten(0, 1)[batch["predictor_N"]]
                ids_N = batch["learnt_N"]
                for first in range(0, len(ids_N), CHUNK):
                    rows = slice(first, first + CHUNK)
                    weights = head()
                    hidden_CD = hidden_ND[rows].to(weights.weight_RD.dtype)
                    calibration.add(output_logits(hidden_CD, head=weights, vocab_size=vocab_size), ids_N[rows])
                return hidden_BTD.new_zeros(())

            loss_at_head(model, head_layer=head_layer, loss_of=count, **model_inputs(batch))
    model.train(was_training)
    return calibration.metrics()
