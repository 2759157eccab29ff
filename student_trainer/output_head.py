"""An output head as the loss needs it: parameters, and what happens to logits behind it.

Shape suffixes: N positions, C positions of one chunk, D hidden size, V the vocabulary without padding rows, R rows of
the head with them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputHead:
    """logits = soft_cap * tanh((hidden @ weight.T + bias) * logit_scale / soft_cap); no cap where soft_cap is 0.

    Rows of the vocabulary's padding may follow the tokens' own.
    """

    weight_RD: Tensor
    bias_R: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float = 0.0


def output_logits(hidden_ND: Tensor, *, head: OutputHead, vocab_size: int) -> Tensor:
    """Float32 logits [N, V] of few positions, for comparison with a model's own."""
    bias_V = None if head.bias_R is None else head.bias_R[:vocab_size]
    return project(hidden_ND, head.weight_RD[:vocab_size], bias_V, head.logit_scale, head.soft_cap, torch.float32)


def project(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    soft_cap: float,
    dtype: torch.dtype,
) -> Tensor:
    """Logits of one chunk in ``dtype``, from weights and bias without padding rows."""
    return shape_logits(hidden_CD @ weight_VD.T, bias_V, logit_scale, soft_cap, dtype)


def shape_logits(
    products_CV: Tensor, bias_V: Tensor | None, logit_scale: float, soft_cap: float, dtype: torch.dtype
) -> Tensor:
    """What happens to hidden @ weight.T before a softmax; the products may be overwritten."""
    logits_CV = products_CV.to(dtype)
    if bias_V is not None:
        logits_CV += bias_V.to(dtype)
    if logit_scale != 1.0:
        logits_CV *= logit_scale
    if soft_cap:
        logits_CV = logits_CV.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits_CV
