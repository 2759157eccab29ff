"""Universal logit distillation (ULD, arXiv:2402.12030): a soft term for teachers whose tokens are not the student's.

The Wasserstein distance between two distributions whose outcomes are all equally far from each other's is
sum_i |q_(i) - p_(i)|: both sorted by probability, the shorter filled up with 0 (equation 5). Which token a probability
belongs to does not enter.

Shape suffixes: C positions of one chunk, M those of them that have a label, V the student's vocabulary, K ranks of the
teacher's that are known.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class UniversalLabel(NamedTuple):
    """The teacher's probabilities at the loss's temperature, largest first, for some rows of a chunk.

    ``tail_M``: the mass of all ranks after the K known ones; None where those are all.
    """

    rows_M: Tensor
    ranked_MK: Tensor
    tail_M: Tensor | None


def add_universal(probs_CV: Tensor, grad_CV: Tensor, label: UniversalLabel, *, strength: float) -> Tensor:
    """The distance per position, 0 where there is no label; its gradient on the logits, times ``strength``, is added
    to ``grad_CV``, which may be ``probs_CV`` itself.

    With s the sign of q_(i) - p_(i) at each token's rank, that is q (s - sum q s). Of a truncated label, the ranks that
    it leaves out are compared as one sum, which is at most their own distance.
    """
    probs_MV = probs_CV[label.rows_M]
    ranked_MV, order_MV = probs_MV.sort(dim=1, descending=True)
    known = min(ranked_MV.shape[1], label.ranked_MK.shape[1])
    above_MV = ranked_MV[:, :known] - label.ranked_MK[:, :known]
    value_M = above_MV.abs().sum(dim=1) + label.ranked_MK[:, known:].sum(dim=1)
    rest_M = ranked_MV[:, known:].sum(dim=1)
    if label.tail_M is not None:
        rest_M = rest_M - label.tail_M
    value_M = value_M + rest_M.abs()

    sign_MV = rest_M.sign().unsqueeze(1).expand_as(probs_MV).contiguous()
    sign_MV[:, :known] = above_MV.sign_()
    sign_MV = torch.empty_like(sign_MV).scatter_(1, order_MV, sign_MV)
    mean_M = torch.linalg.vecdot(probs_MV, sign_MV)
    grad_CV.index_add_(0, label.rows_M, probs_MV.mul_(sign_MV.sub_(mean_M.unsqueeze(1))), alpha=strength)
    return grad_CV.new_zeros(len(grad_CV)).index_copy_(0, label.rows_M, value_M)
