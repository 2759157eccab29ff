"""The distillation loss, fused with the student's output head.

    L = CE(softmax(z_s), y) + alpha * T^2 * CE(softmax(z_s / T), softmax(z_t / T))

summed over response tokens, with student logits z_s, teacher logits z_t and the token y that stands there ("Smoothing
Out Hallucinations", Nguyen et al. 2025, equations 1 to 3, at T = 1; T^2 as in arXiv:1503.02531). Per token, with m the
mass of the teacher's label, L is (1 + alpha*m) * logsumexp(z_s) - z_s[y] - alpha * sum_v p_t[v] * z_s[v] at T = 1.

Logits exist for one chunk of positions at a time: gradients are formed in the forward pass, so that no tensor of all
positions by the vocabulary is ever made, neither the student's nor the teacher's.

Shape suffixes: N response positions, C positions of one chunk, D the student's hidden size, E the teacher's, V the
vocabulary without padding rows, R rows of the head with them, K kept tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_trainer.output_head import OutputHead, project

MIN_TAIL_MASS = 1e-6
"""A ghost bucket below this mass is dropped: the logarithm of what the student leaves for it is mostly rounding."""

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactTargets:
    """The teacher's final hidden states and the head that turns them into its logits."""

    hidden_NE: Tensor
    head: OutputHead


@dataclass(frozen=True, kw_only=True, eq=False)
class TopKTargets:
    """The teacher's likeliest tokens at the loss's temperature and the mass of all others, one ghost bucket.

    ``ids_NK`` int64; ``logprobs_NK`` under the full softmax; ``tail_mass_N``.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_mass_N: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class FullTargets:
    """The teacher's log-probabilities of the whole vocabulary at temperature 1."""

    logprobs_NV: Tensor


SoftTargets = ExactTargets | TopKTargets | FullTargets


class LossSums(NamedTuple):
    """Sums over response tokens, to be divided by one count over all micro-batches and ranks of a step.

    ``total`` is hard + alpha * soft and carries the gradient; ``hard`` and ``soft`` are for the record.
    """

    total: Tensor
    hard: Tensor
    soft: Tensor
    tokens: int


def distillation_loss(
    hidden_ND: Tensor,
    *,
    token_ids_N: Tensor,
    head: OutputHead,
    vocab_size: int,
    targets: SoftTargets | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> LossSums:
    """The loss of N response positions, in nats; without ``targets`` the soft term is 0 (supervised fine-tuning).

    ``hidden_ND``: the student's final hidden states from which ``token_ids_N`` are predicted. Gradients reach the
    hidden states and the head's weight and bias, once: the graph cannot be walked twice. ``chunk_size``: positions
    whose logits exist at a time. ``matmul_dtype``: precision of the products with the heads, the hidden states' own by
    default; sums and softmaxes are float32, or float64 where the hidden states are.
    """
    job = _Job(
        token_ids_N=token_ids_N,
        targets=targets,
        logit_scale=head.logit_scale,
        soft_cap=head.soft_cap,
        vocab_size=vocab_size,
        alpha=alpha,
        temperature=temperature,
        chunk_size=chunk_size or _chunk_size(hidden_ND.device, vocab_size=vocab_size),
        matmul_dtype=matmul_dtype or hidden_ND.dtype,
        wants_gradients=torch.is_grad_enabled(),
    )
    total, hard, soft = _FusedLoss.apply(hidden_ND, head.weight_RD, head.bias_R, job)
    return LossSums(total=total, hard=hard, soft=soft, tokens=len(token_ids_N))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What the loss needs besides the tensors that gradients flow to."""

    token_ids_N: Tensor
    targets: SoftTargets | None
    logit_scale: float
    soft_cap: float
    vocab_size: int
    alpha: float
    temperature: float
    chunk_size: int
    matmul_dtype: torch.dtype
    wants_gradients: bool


def _chunk_size(device: torch.device, *, vocab_size: int) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


class _FusedLoss(torch.autograd.Function):
    """Forms the gradients while each chunk's logits exist; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_RD: Tensor, bias_R: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        sums_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        wants = [job.wants_gradients and wanted for wanted in ctx.needs_input_grad[:3]]
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants[0] else None
        # Sums of many chunks: bfloat16 would lose the small ones.
        weight_grad_RD = torch.zeros_like(weight_RD, dtype=sums_dtype) if wants[1] else None
        bias_grad_R = torch.zeros_like(bias_R, dtype=sums_dtype) if wants[2] and bias_R is not None else None
        hard, soft = hidden_ND.new_zeros(2, dtype=sums_dtype).unbind()

        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight_VD = weight_RD[: job.vocab_size].to(job.matmul_dtype)
            bias_V = None if bias_R is None else bias_R[: job.vocab_size]
            # float16 flushes gradients below 6e-8 to zero, and most of a large vocabulary's are smaller.
            grad_dtype = torch.float32 if job.matmul_dtype == torch.float16 else job.matmul_dtype
            grad_weight_VD = weight_VD.to(grad_dtype)
            teacher = _TeacherChunks(job, sums_dtype)
            for start in range(0, len(hidden_ND), job.chunk_size):
                rows = slice(start, start + job.chunk_size)
                hidden_CD = hidden_ND[rows].to(job.matmul_dtype)
                logits_CV = project(hidden_CD, weight_VD, bias_V, job.logit_scale, job.soft_cap, sums_dtype)
                hard_C, soft_C, grad_CV = _chunk_loss(logits_CV, rows, job, teacher)
                hard = hard + hard_C.sum()
                soft = soft + soft_C.sum()
                if not any(wants):
                    continue
                if job.soft_cap:
                    grad_CV *= 1 - (logits_CV / job.soft_cap).square_()
                if job.logit_scale != 1.0:
                    grad_CV *= job.logit_scale
                if bias_grad_R is not None:
                    bias_grad_R[: job.vocab_size] += grad_CV.sum(dim=0)
                grad_CV = grad_CV.to(grad_dtype)
                if hidden_grad_ND is not None:
                    hidden_grad_ND[rows] = (grad_CV @ grad_weight_VD).to(hidden_grad_ND.dtype)
                if weight_grad_RD is not None:
                    _add_product(weight_grad_RD[: job.vocab_size], grad_CV.T, hidden_CD.to(grad_dtype))

        ctx.gradients = [
            None if grad is None or of is None else grad.to(of.dtype)
            for grad, of in ((hidden_grad_ND, hidden_ND), (weight_grad_RD, weight_RD), (bias_grad_R, bias_R))
        ]
        ctx.mark_non_differentiable(hard, soft)
        return hard + job.alpha * soft, hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the graph of the distillation loss is walked once only"
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(grad_total) for gradient in gradients), None


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    if left_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    else:
        sum_VD += left_VC @ right_CD


def _chunk_loss(logits_CV: Tensor, rows: slice, job: _Job, teacher: "_TeacherChunks") -> tuple[Tensor, Tensor, Tensor]:
    """Hard and soft loss per position, and the gradient of hard + alpha * soft on the (capped) logits."""
    ids_C1 = job.token_ids_N[rows].unsqueeze(1)
    norm_C = torch.logsumexp(logits_CV, dim=1)
    hard_C = norm_C - logits_CV.gather(1, ids_C1).squeeze(1)
    grad_CV = torch.sub(logits_CV, norm_C.unsqueeze(1)).exp_()
    soft_C = torch.zeros_like(hard_C)
    if job.targets is not None:
        soft_C = teacher.add_soft_loss(logits_CV, norm_C, grad_CV, rows)
    grad_CV.scatter_add_(1, ids_C1, torch.full_like(ids_C1, -1, dtype=grad_CV.dtype))
    return hard_C, soft_C, grad_CV


class _TeacherChunks:
    """The soft term of each chunk, from whichever labels there are."""

    def __init__(self, job: _Job, dtype: torch.dtype) -> None:
        self.job = job
        self.dtype = dtype
        if isinstance(job.targets, ExactTargets):
            head = job.targets.head
            self.weight_VE = head.weight_RD[: job.vocab_size].to(job.matmul_dtype)
            self.bias_V = None if head.bias_R is None else head.bias_R[: job.vocab_size]

    def add_soft_loss(self, logits_CV: Tensor, norm_C: Tensor, grad_CV: Tensor, rows: slice) -> Tensor:
        """Soft loss per position; its gradient, times alpha, is added to ``grad_CV``, which holds softmax(logits).

        The gradient on the logits is T * (m * softmax(logits / T) - p), with p the label and m its mass.
        """
        job = self.job
        heat = job.temperature
        if heat == 1:
            heated_CV, probs_CV = logits_CV, grad_CV
        else:
            heated_CV = logits_CV / heat
            norm_C = torch.logsumexp(heated_CV, dim=1)
            probs_CV = torch.sub(heated_CV, norm_C.unsqueeze(1)).exp_()
        if isinstance(job.targets, TopKTargets):
            return self._add_top_k(heated_CV, norm_C, probs_CV, grad_CV, rows)
        label_CV = self._dense_label(rows)
        soft_C: Tensor = heat**2 * (norm_C - torch.linalg.vecdot(label_CV, heated_CV))
        # probs_CV may be grad_CV itself: it is used up before the label is taken off.
        grad_CV.add_(probs_CV, alpha=job.alpha * heat).sub_(label_CV, alpha=job.alpha * heat)
        return soft_C

    def _dense_label(self, rows: slice) -> Tensor:
        targets, heat = self.job.targets, self.job.temperature
        if isinstance(targets, ExactTargets):
            hidden_CE = targets.hidden_NE[rows].to(self.job.matmul_dtype)
            head = targets.head
            scores_CV = project(hidden_CE, self.weight_VE, self.bias_V, head.logit_scale, head.soft_cap, self.dtype)
        else:
            assert isinstance(targets, FullTargets)
            scores_CV = targets.logprobs_NV[rows, : self.job.vocab_size].to(self.dtype)
        return torch.softmax(scores_CV if heat == 1 else scores_CV / heat, dim=1)

    def _add_top_k(self, heated_CV: Tensor, norm_C: Tensor, probs_CV: Tensor, grad_CV: Tensor, rows: slice) -> Tensor:
        """sum_K p log q + tail * log(1 - Q_K), negated: the tail keeps its mass, spread as the student spreads it."""
        targets, heat = self.job.targets, self.job.temperature
        assert isinstance(targets, TopKTargets)
        strength = self.job.alpha * heat
        ids_CK = targets.ids_NK[rows]
        label_CK = targets.logprobs_NK[rows].to(self.dtype).exp()
        tail_C = targets.tail_mass_N[rows].to(self.dtype)
        tail_C = tail_C.masked_fill(tail_C < MIN_TAIL_MASS, 0.0)
        mass_C = label_CK.sum(dim=1) + tail_C

        off_CV = heated_CV.scatter(1, ids_CK, -torch.inf)
        # Infinity where there is no bucket makes every exp below 0 instead of 0 / 0.
        off_norm_C = torch.logsumexp(off_CV, dim=1).masked_fill(tail_C == 0, torch.inf)
        kept_C = (label_CK * heated_CV.gather(1, ids_CK)).sum(dim=1)
        soft_C = mass_C * norm_C - kept_C - torch.where(tail_C > 0, tail_C * off_norm_C, 0.0)

        grad_CV.addcmul_(probs_CV, mass_C.unsqueeze(1), value=strength)
        grad_CV.scatter_add_(1, ids_CK, label_CK * -strength)
        grad_CV.addcmul_(off_CV.sub_(off_norm_C.unsqueeze(1)).exp_(), tail_C.unsqueeze(1), value=-strength)
        return heat**2 * soft_C
