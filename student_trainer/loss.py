"""The distillation loss, fused with the student's output head.

    L = CE(softmax(z_s), y) + alpha * T^2 * CE(softmax(z_s / T), softmax(z_t / T))

summed over response tokens, with student logits z_s, teacher logits z_t and the token y that stands there ("Smoothing
Out Hallucinations", Nguyen et al. 2025, equations 1 to 3, at T = 1; T^2 as in arXiv:1503.02531). Per token, with m the
mass of the teacher's label, L is (1 + alpha*m) * logsumexp(z_s) - z_s[y] - alpha * sum_v p_t[v] * z_s[v] at T = 1.
Other divergences can take the place of the second CE: see student_trainer/divergences.py, and for teachers with another
tokenizer student_trainer/universal.py.

Logits exist for one chunk of positions at a time: gradients are formed in the forward pass, so that no tensor of all
positions by the vocabulary is ever made, neither the student's nor the teacher's.

Shape suffixes: N response positions, C positions of one chunk, D the student's hidden size, E the teacher's, V the
vocabulary without padding rows, R rows of the head with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from services.contract.distillation_spec import Divergence
from services.contract.errors import UnsupportedError
from student_trainer.chunk_labels import ChunkLabels
from student_trainer.chunk_loss import Terms, fastest_chunk_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import (
    ExactTargets,
    FullTargets,
    MixedTargets,
    ProjectedTargets,
    SoftTargets,
    UniversalTargets,
)

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


class LossSums(NamedTuple):
    """Sums over response tokens, to be divided by one count over all micro-batches and ranks of a step.

    ``total`` is hard + alpha * soft and carries the gradient; ``hard`` and ``soft`` are for the record, and so are
    those of chunk_loss.OBSERVED in ``observed`` that were asked for and that the labels can tell.
    """

    total: Tensor
    hard: Tensor
    soft: Tensor
    tokens: int
    observed: Mapping[str, Tensor] = MappingProxyType({})


def distillation_loss(
    hidden_ND: Tensor,
    *,
    token_ids_N: Tensor,
    head: OutputHead,
    vocab_size: int,
    targets: SoftTargets | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = "cross_entropy",
    beta: float = 0.5,
    hard_term: bool = True,
    chunk_size: int | None = None,
    matmul_dtype: torch.dtype | None = None,
    observe: bool = False,
) -> LossSums:
    """The loss of N response positions, in nats; without ``targets`` the soft term is 0 (supervised fine-tuning).

    ``hidden_ND``: the student's final hidden states from which ``token_ids_N`` are predicted. Gradients reach the
    hidden states and the head's weight and bias, once: the graph cannot be walked twice. Divergences other than
    cross_entropy need targets that give the whole distribution. ``hard_term`` false leaves that term out, as 0.
    ``chunk_size``: positions whose logits exist at a time. ``matmul_dtype``: precision of the products with the heads,
    the hidden states' own by default; sums and softmaxes are float32, or float64 where the hidden states are.

    UnsupportedError for projected targets of a head that is trained, or whose logits are capped.
    """
    matmul_dtype = matmul_dtype or hidden_ND.dtype
    if isinstance(targets, ProjectedTargets):
        require_projectable(head)
    assert divergence == "cross_entropy" or isinstance(targets, ExactTargets | FullTargets | MixedTargets | None)
    job = _Job(
        token_ids_N=token_ids_N,
        targets=targets,
        vocab_size=vocab_size,
        terms=Terms(
            alpha=alpha,
            temperature=temperature,
            logit_scale=head.logit_scale,
            soft_cap=head.soft_cap,
            dtype=torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32,
            # float16 flushes gradients below 6e-8 to zero, and most of a large vocabulary's are smaller.
            grad_dtype=torch.float32 if matmul_dtype == torch.float16 else matmul_dtype,
            divergence=divergence,
            beta=beta,
            hard_term=hard_term,
            observed=observe,
        ),
        chunk_size=chunk_size or _chunk_size(hidden_ND.device, vocab_size=max(vocab_size, _teacher_vocab(targets))),
        matmul_dtype=matmul_dtype,
        wants_gradients=torch.is_grad_enabled(),
    )
    total, hard, soft = _FusedLoss.apply(hidden_ND, head.weight_RD, head.bias_R, job)
    return LossSums(total=total, hard=hard, soft=soft, tokens=len(token_ids_N), observed=job.observed)


def require_projectable(head: OutputHead) -> None:
    """UnsupportedError for a head that projected labels do not describe.

    They are means of the head as it was when the teacher got it, and stand for logits that are linear in it.
    """
    if head.soft_cap:
        raise UnsupportedError(
            f"projected labels cannot be used with a student whose logits are capped at {head.soft_cap:g}",
            fix="Set distillation.labels.encoding to exact.",
        )
    if head.weight_RD.requires_grad or (head.bias_R is not None and head.bias_R.requires_grad):
        raise UnsupportedError(
            "projected labels need a student whose output head is frozen, and this one is trained",
            fix="Train adapters (student.lora) that leave the output head alone, or set "
            "distillation.labels.encoding to exact.",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What the loss needs besides the tensors that gradients flow to; ``observed`` is filled in the forward pass."""

    token_ids_N: Tensor
    targets: SoftTargets | None
    vocab_size: int
    terms: Terms
    chunk_size: int
    matmul_dtype: torch.dtype
    wants_gradients: bool
    observed: dict[str, Tensor] = field(default_factory=dict)


def _chunk_size(device: torch.device, *, vocab_size: int) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


def _teacher_vocab(targets: SoftTargets | None) -> int:
    """Tokens of a teacher that has others than the student."""
    labels = targets.labels if isinstance(targets, UniversalTargets) else None
    if isinstance(labels, ExactTargets):
        return len(labels.head.weight_RD)
    return labels.logprobs_NV.shape[1] if isinstance(labels, FullTargets) else 0


class _FusedLoss(torch.autograd.Function):
    """Forms the gradients while each chunk's logits exist; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_RD: Tensor, bias_R: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        wanted = [job.wants_gradients and needed for needed in ctx.needs_input_grad[:3]]
        dense = job.targets is None or isinstance(job.targets, ExactTargets | FullTargets | MixedTargets)
        loss_of = fastest_chunk_loss(job.terms, device=hidden_ND.device, dense=dense)
        hard, soft = hidden_ND.new_zeros(2, dtype=job.terms.dtype).unbind()
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight_VD = weight_RD[: job.vocab_size].to(job.matmul_dtype)
            bias_V = None if bias_R is None else bias_R[: job.vocab_size]
            labels = ChunkLabels(
                job.targets, hidden_ND, vocab_size=job.vocab_size, terms=job.terms, matmul_dtype=job.matmul_dtype
            )
            gradients = _Gradients(job, hidden_ND, weight_RD, bias_R, weight_VD=weight_VD, wanted=wanted)
            for start in range(0, len(hidden_ND), job.chunk_size):
                rows = slice(start, min(start + job.chunk_size, len(hidden_ND)))
                hidden_CD = hidden_ND[rows].to(job.matmul_dtype)
                ids_C = job.token_ids_N[rows]
                hard_C, soft_C, grad_CV, observed = loss_of(hidden_CD @ weight_VD.T, bias_V, ids_C, labels.of(rows))
                hard = hard + hard_C.sum()
                soft = soft + soft_C.sum()
                for name, value in observed.items():
                    job.observed[name] = job.observed.get(name, 0) + value
                gradients.add(rows, hidden_CD, grad_CV)
        ctx.gradients = gradients.in_their_own_types()
        ctx.mark_non_differentiable(hard, soft)
        return hard + job.terms.alpha * soft, hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the graph of the distillation loss is walked once only"
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(grad_total) for gradient in gradients), None


class _Gradients:
    """The gradients on hidden states, weight and bias as chunks add to them; None where they are not ``wanted``."""

    def __init__(
        self,
        job: _Job,
        hidden_ND: Tensor,
        weight_RD: Tensor,
        bias_R: Tensor | None,
        *,
        weight_VD: Tensor,
        wanted: list[bool],
    ) -> None:
        self._job = job
        self._dtypes = [hidden_ND.dtype, weight_RD.dtype, None if bias_R is None else bias_R.dtype]
        self._hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        # Sums of many chunks: bfloat16 would lose the small ones.
        sums_dtype = job.terms.dtype
        self._weight_RD = torch.zeros_like(weight_RD, dtype=sums_dtype) if wanted[1] else None
        self._bias_R = torch.zeros_like(bias_R, dtype=sums_dtype) if wanted[2] and bias_R is not None else None
        self._head_VD = weight_VD.to(job.terms.grad_dtype) if wanted[0] else weight_VD

    def add(self, rows: slice, hidden_CD: Tensor, grad_CV: Tensor) -> None:
        if self._bias_R is not None:
            self._bias_R[: self._job.vocab_size] += grad_CV.sum(dim=0, dtype=self._bias_R.dtype)
        if self._hidden_ND is not None:
            self._hidden_ND[rows] = self._on_hidden(rows, grad_CV).to(self._hidden_ND.dtype)
        if self._weight_RD is not None:
            _add_product(self._weight_RD[: self._job.vocab_size], grad_CV.T, hidden_CD.to(grad_CV.dtype))

    def in_their_own_types(self) -> list[Tensor | None]:
        gradients = (self._hidden_ND, self._weight_RD, self._bias_R)
        return [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, self._dtypes, strict=True)
        ]

    def _on_hidden(self, rows: slice, grad_CV: Tensor) -> Tensor:
        targets, terms = self._job.targets, self._job.terms
        if not isinstance(targets, ProjectedTargets):
            return grad_CV @ self._head_VD
        # Two mean rows, almost equal near the end of training: their difference is taken before anything is rounded.
        through_logits_CD = _unrounded_product(grad_CV, self._head_VD, terms.dtype)
        strength = terms.alpha * terms.temperature * terms.logit_scale
        return through_logits_CD.sub_(targets.embedding_ND[rows].to(terms.dtype), alpha=strength)


def _unrounded_product(left_CV: Tensor, right_VD: Tensor, dtype: torch.dtype) -> Tensor:
    if left_CV.dtype == dtype:
        return left_CV @ right_VD
    if left_CV.is_cuda:
        return torch.mm(left_CV, right_VD, out_dtype=dtype)
    return left_CV.to(dtype) @ right_VD.to(dtype)


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    if left_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    else:
        sum_VD += left_VC @ right_CD
