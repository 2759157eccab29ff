"""The loss of one chunk of positions and its gradient, from the products of hidden states and output heads.

Shape suffixes: C positions of one chunk, V the vocabulary without padding rows, K kept tokens, M distinct drawn tokens
of the chunk.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from services.contract.distillation_spec import Divergence
from student_trainer.divergences import DIVERGENCES
from student_trainer.output_head import shape_logits
from student_trainer.universal import UniversalLabel, add_universal

OBSERVED = ("student_entropy", "teacher_entropy", "agreement")
"""What chunks tell besides the loss, as sums over positions: entropies in nats at temperature 1, and the positions
where student and teacher find the same token likeliest.
"""

MIN_TAIL_MASS = 1e-6
"""A ghost bucket below this mass is dropped: the logarithm of what the student leaves for it is mostly rounding."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the loss is made of. ``beta`` goes with the divergence jsd; ``dtype`` is that of logits and sums.

    ``hard_term``: whether the tokens themselves are learnt; without it there is the soft term alone.
    ``observed``: whether chunks also tell what OBSERVED names.
    """

    alpha: float
    temperature: float
    logit_scale: float
    soft_cap: float
    dtype: torch.dtype
    grad_dtype: torch.dtype
    divergence: Divergence = "cross_entropy"
    beta: float = 0.5
    hard_term: bool = True
    observed: bool = False


class DenseLabel(NamedTuple):
    """The teacher's logits at temperature 1, up to a constant per position.

    ``tempered``: they are made up for the loss's temperature, and tell nothing of any other.
    """

    scores_CV: Tensor
    tempered: bool = False


class TopKLabel(NamedTuple):
    """Probabilities of the likeliest tokens and of all others together, at the loss's temperature."""

    ids_CK: Tensor
    probs_CK: Tensor
    tail_C: Tensor


class SampledLabel(NamedTuple):
    """Weights of drawn tokens, and the row each belongs to."""

    rows_M: Tensor
    ids_M: Tensor
    weights_M: Tensor


class ProjectedLabel(NamedTuple):
    """The mean of the student's logits under the teacher's distribution at the loss's temperature."""

    mean_logit_C: Tensor


Label = DenseLabel | TopKLabel | SampledLabel | ProjectedLabel | UniversalLabel
ChunkLoss = Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]


def chunk_loss(
    products_CV: Tensor, bias_V: Tensor | None, ids_C: Tensor, label: Label | None, *, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Hard and soft loss per position, the gradient of hard + alpha * soft on hidden @ weight.T + bias, and those of
    OBSERVED that the label can tell.

    ``products_CV``: hidden @ weight.T, which this may overwrite. Of a projected label the gradient leaves out what
    reaches the hidden states through the label itself, which no logit carries.
    """
    logits_CV = shape_logits(products_CV, bias_V, terms.logit_scale, terms.soft_cap, terms.dtype)
    ids_C1 = ids_C.unsqueeze(1)
    norm_C = torch.logsumexp(logits_CV, dim=1)
    hard_C = norm_C - logits_CV.gather(1, ids_C1).squeeze(1)
    grad_CV = torch.sub(logits_CV, norm_C.unsqueeze(1)).exp_()
    observed = _observe(logits_CV, norm_C, grad_CV, label) if terms.observed else {}
    soft_C = torch.zeros_like(hard_C)
    if label is not None:
        soft_C = _add_soft(logits_CV, norm_C, grad_CV, label, terms)
    if terms.hard_term:
        grad_CV.scatter_add_(1, ids_C1, torch.full_like(ids_C1, -1, dtype=grad_CV.dtype))
    else:
        hard_C = torch.zeros_like(hard_C)
        grad_CV -= torch.sub(logits_CV, norm_C.unsqueeze(1)).exp_()
    if terms.soft_cap:
        grad_CV *= 1 - (logits_CV / terms.soft_cap).square_()
    if terms.logit_scale != 1.0:
        grad_CV *= terms.logit_scale
    return hard_C, soft_C, grad_CV.to(terms.grad_dtype), observed


def fastest_chunk_loss(terms: Terms, *, device: torch.device, dense: bool) -> ChunkLoss:
    """``chunk_loss`` with these terms; compiled for dense labels on a GPU, where reading and writing logits costs most.

    On a CPU compiling takes longer than it saves; without Triton and a C compiler it cannot be done.
    """
    if dense and device.type == "cuda" and _can_compile():
        return compiled_chunk_loss(terms)
    return functools.partial(chunk_loss, terms=terms)


@functools.lru_cache(maxsize=16)
def compiled_chunk_loss(terms: Terms, **options: Any) -> ChunkLoss:
    """``chunk_loss`` as few kernels; ``options`` are torch.compile's."""
    # Only the number of positions varies, and only in a batch's last chunk.
    return torch.compile(functools.partial(chunk_loss, terms=terms), dynamic=None, **options)


@functools.cache
def _can_compile() -> bool:
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, filter(None, compilers)))


def _observe(logits_CV: Tensor, norm_C: Tensor, probs_CV: Tensor, label: Label | None) -> dict[str, Tensor]:
    """A top-k label knows the likeliest token, but not how its tail is spread; draws and projections know neither."""
    sums = {"student_entropy": (norm_C - torch.linalg.vecdot(probs_CV, logits_CV)).sum()}
    if isinstance(label, DenseLabel):
        if not label.tempered:
            sums["teacher_entropy"] = torch.special.entr(torch.softmax(label.scores_CV, dim=1)).sum()
        sums["agreement"] = (logits_CV.argmax(dim=1) == label.scores_CV.argmax(dim=1)).sum()
    elif isinstance(label, TopKLabel):
        likeliest_C1 = label.ids_CK.gather(1, label.probs_CK.argmax(dim=1, keepdim=True))
        sums["agreement"] = (logits_CV.argmax(dim=1, keepdim=True) == likeliest_C1).sum()
    return sums


def _add_soft(logits_CV: Tensor, norm_C: Tensor, grad_CV: Tensor, label: Label, terms: Terms) -> Tensor:
    """Soft loss per position; its gradient, times alpha, is added to ``grad_CV``, which holds softmax(logits).

    With m the label's mass and p the label, that is alpha * T * (m * softmax(logits / T) - p) for cross-entropies.
    """
    heat = terms.temperature
    strength = terms.alpha * heat
    if heat == 1:
        heated_CV, probs_CV = logits_CV, grad_CV
    else:
        heated_CV = logits_CV / heat
        norm_C = torch.logsumexp(heated_CV, dim=1)
        probs_CV = torch.sub(heated_CV, norm_C.unsqueeze(1)).exp_()
    if isinstance(label, DenseLabel):
        scores_CV = label.scores_CV if heat == 1 else label.scores_CV / heat
        options = {"beta": terms.beta} if terms.divergence == "jsd" else {}
        divergence = DIVERGENCES[terms.divergence]
        soft_C = divergence(heated_CV, norm_C, probs_CV, scores_CV, grad_CV, strength=strength, **options)
    elif isinstance(label, TopKLabel):
        soft_C = _add_top_k(heated_CV, norm_C, probs_CV, grad_CV, label, strength=strength)
    elif isinstance(label, SampledLabel):
        soft_C = _add_sampled(heated_CV, norm_C, probs_CV, grad_CV, label, strength=strength)
    elif isinstance(label, UniversalLabel):
        soft_C = add_universal(probs_CV, grad_CV, label, strength=strength)
    else:
        grad_CV.add_(probs_CV, alpha=strength)
        soft_C = norm_C - label.mean_logit_C / heat
    return heat**2 * soft_C


def _add_top_k(
    heated_CV: Tensor, norm_C: Tensor, probs_CV: Tensor, grad_CV: Tensor, label: TopKLabel, *, strength: float
) -> Tensor:
    """sum_K p log q + tail * log(1 - Q_K), negated: the tail keeps its mass, spread as the student spreads it."""
    tail_C = label.tail_C.masked_fill(label.tail_C < MIN_TAIL_MASS, 0.0)
    mass_C = label.probs_CK.sum(dim=1) + tail_C

    off_CV = heated_CV.scatter(1, label.ids_CK, -torch.inf)
    # Infinity where there is no bucket makes every exp below 0 instead of 0 / 0.
    off_norm_C = torch.logsumexp(off_CV, dim=1).masked_fill(tail_C == 0, torch.inf)
    kept_C = (label.probs_CK * heated_CV.gather(1, label.ids_CK)).sum(dim=1)
    soft_C = mass_C * norm_C - kept_C - torch.where(tail_C > 0, tail_C * off_norm_C, 0.0)

    grad_CV.addcmul_(probs_CV, mass_C.unsqueeze(1), value=strength)
    grad_CV.scatter_add_(1, label.ids_CK, label.probs_CK * -strength)
    grad_CV.addcmul_(off_CV.sub_(off_norm_C.unsqueeze(1)).exp_(), tail_C.unsqueeze(1), value=-strength)
    return soft_C


def _add_sampled(
    heated_CV: Tensor, norm_C: Tensor, probs_CV: Tensor, grad_CV: Tensor, label: SampledLabel, *, strength: float
) -> Tensor:
    """Cross-entropy against the draws, whose mean over draws is that against the distribution itself."""
    chosen_M = heated_CV[label.rows_M, label.ids_M]
    drawn_C = torch.zeros_like(norm_C).index_add_(0, label.rows_M, label.weights_M * chosen_M)
    grad_CV.add_(probs_CV, alpha=strength)
    # Each token of a row stands there once, so that nothing is lost without accumulation.
    grad_CV[label.rows_M, label.ids_M] -= strength * label.weights_M
    return norm_C - drawn_C
