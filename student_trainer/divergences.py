"""How far the student's distribution q is from the teacher's p, for labels that give all of p.

    cross_entropy   -sum p log q                                     the paper's, and the default
    forward_kl      sum p log(p / q)                                 the same less the teacher's entropy
    reverse_kl      sum q log(q / p)                                 MiniLLM, arXiv:2306.08543
    jsd             beta KL(p | m) + (1 - beta) KL(q | m),           generalised Jensen-Shannon divergence,
                    m = beta p + (1 - beta) q                        GKD, arXiv:2306.13649, equation 1

Each takes the student's logits (already divided by the temperature) with their logsumexp and softmax, and the
teacher's; adds ``strength`` times its gradient on those logits to ``grad_CV``; and returns its value per position.
``probs_CV`` may be ``grad_CV`` itself: it is used up in the step that changes ``grad_CV``.

Shape suffixes: C positions of one chunk, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from services.contract.distillation_spec import Divergence

DenseTerm = Callable[..., Tensor]


def _cross_entropy(
    logits_CV: Tensor, norm_C: Tensor, probs_CV: Tensor, scores_CV: Tensor, grad_CV: Tensor, *, strength: float
) -> Tensor:
    label_CV = torch.softmax(scores_CV, dim=1)
    value_C: Tensor = norm_C - torch.linalg.vecdot(label_CV, logits_CV)
    grad_CV.add_(probs_CV, alpha=strength).sub_(label_CV, alpha=strength)
    return value_C


def _forward_kl(
    logits_CV: Tensor, norm_C: Tensor, probs_CV: Tensor, scores_CV: Tensor, grad_CV: Tensor, *, strength: float
) -> Tensor:
    value_C = _cross_entropy(logits_CV, norm_C, probs_CV, scores_CV, grad_CV, strength=strength)
    entropy_C: Tensor = torch.special.entr(torch.softmax(scores_CV, dim=1)).sum(dim=1)
    return value_C - entropy_C


def _reverse_kl(
    logits_CV: Tensor, norm_C: Tensor, probs_CV: Tensor, scores_CV: Tensor, grad_CV: Tensor, *, strength: float
) -> Tensor:
    """The gradient is q (log(q / p) - KL)."""
    ratio_CV = (logits_CV - norm_C.unsqueeze(1)).sub_(torch.log_softmax(scores_CV, dim=1))
    # Both probabilities too small for a float: infinity less infinity.
    ratio_CV.masked_fill_(probs_CV == 0, 0.0)
    value_C: Tensor = torch.linalg.vecdot(probs_CV, ratio_CV)
    grad_CV.addcmul_(probs_CV, ratio_CV.sub_(value_C.unsqueeze(1)), value=strength)
    return value_C


def _jsd(
    logits_CV: Tensor,
    norm_C: Tensor,
    probs_CV: Tensor,
    scores_CV: Tensor,
    grad_CV: Tensor,
    *,
    strength: float,
    beta: float,
) -> Tensor:
    """The gradient is (1 - beta) q (log(q / m) - KL(q | m))."""
    log_p_CV = torch.log_softmax(scores_CV, dim=1)
    log_q_CV = logits_CV - norm_C.unsqueeze(1)
    log_m_CV = torch.logaddexp(log_p_CV + math.log(beta), log_q_CV + math.log1p(-beta))
    label_CV = log_p_CV.exp()
    above_CV = log_p_CV.sub_(log_m_CV).masked_fill_(label_CV == 0, 0.0)
    below_CV = log_q_CV.sub_(log_m_CV).masked_fill_(probs_CV == 0, 0.0)
    below_C = torch.linalg.vecdot(probs_CV, below_CV)
    grad_CV.addcmul_(probs_CV, below_CV.sub_(below_C.unsqueeze(1)), value=strength * (1 - beta))
    value_C: Tensor = beta * torch.linalg.vecdot(label_CV, above_CV) + (1 - beta) * below_C
    return value_C


DIVERGENCES: dict[Divergence, DenseTerm] = {
    "cross_entropy": _cross_entropy,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}
