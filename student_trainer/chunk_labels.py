"""Each chunk's share of a batch's labels, as the loss of one chunk takes it; of exact ones the teacher's logits.

Shape suffixes: N response positions, C positions of one chunk, M those that a teacher of another tokenizer has labels
for, or distinct drawn tokens, D the student's hidden size, E the teacher's, V vocabulary, K kept tokens.
"""

import math
from bisect import bisect_left

import torch
from torch import Tensor

from student_trainer.chunk_loss import DenseLabel, Label, ProjectedLabel, SampledLabel, Terms, TopKLabel
from student_trainer.output_head import project
from student_trainer.targets import (
    ExactTargets,
    FullTargets,
    MixedTargets,
    ProjectedTargets,
    SampledTargets,
    SoftTargets,
    TopKTargets,
    UniversalTargets,
)
from student_trainer.universal import UniversalLabel


class ChunkLabels:
    """``hidden_ND``: the student's, which the mean logits of projected targets come from.

    ``vocab_size`` is the student's, and of all teachers the same but of those with another tokenizer.
    """

    def __init__(
        self,
        targets: SoftTargets | None,
        hidden_ND: Tensor,
        *,
        vocab_size: int,
        terms: Terms,
        matmul_dtype: torch.dtype,
    ) -> None:
        self._targets = targets
        self._terms = terms
        self._matmul_dtype = matmul_dtype
        self._vocab_size: int | None = None if isinstance(targets, UniversalTargets) else vocab_size
        self._parts = [
            ChunkLabels(part, hidden_ND, vocab_size=vocab_size, terms=terms, matmul_dtype=matmul_dtype)
            for part in (targets.parts if isinstance(targets, MixedTargets) else ())
        ]
        of_teacher = targets.labels if isinstance(targets, UniversalTargets) else targets
        if isinstance(of_teacher, ExactTargets):
            self._weight_VE = of_teacher.head.weight_RD[: self._vocab_size].to(matmul_dtype)
            bias_R = of_teacher.head.bias_R
            self._bias_V = None if bias_R is None else bias_R[: self._vocab_size]
        elif isinstance(targets, ProjectedTargets):
            # The hidden states as the products with the head see them.
            rounded_ND = hidden_ND.detach().to(matmul_dtype).to(terms.dtype)
            mean_N = torch.linalg.vecdot(rounded_ND, targets.embedding_ND.to(terms.dtype))
            if targets.bias_N is not None:
                mean_N = mean_N + targets.bias_N.to(terms.dtype)
            self._mean_logit_N = mean_N * terms.logit_scale

    def of(self, rows: slice) -> Label | None:
        """The label of these positions; None where there is none."""
        targets = self._targets
        if targets is None:
            return None
        if isinstance(targets, MixedTargets):
            return self._mixed(targets, rows)
        if isinstance(targets, UniversalTargets):
            return self._universal(targets, rows)
        if isinstance(targets, SampledTargets):
            return _sampled(targets, rows, dtype=self._terms.dtype)
        if isinstance(targets, ProjectedTargets):
            return ProjectedLabel(self._mean_logit_N[rows])
        return self._whole_or_top_k(targets, rows)

    def _whole_or_top_k(self, targets: ExactTargets | FullTargets | TopKTargets, rows: slice) -> DenseLabel | TopKLabel:
        dtype = self._terms.dtype
        if isinstance(targets, ExactTargets):
            head, hidden_CE = targets.head, targets.hidden_NE[rows].to(self._matmul_dtype)
            return DenseLabel(project(hidden_CE, self._weight_VE, self._bias_V, head.logit_scale, head.soft_cap, dtype))
        if isinstance(targets, FullTargets):
            return DenseLabel(targets.logprobs_NV[rows, : self._vocab_size].to(dtype))
        return TopKLabel(
            targets.ids_NK[rows], targets.logprobs_NK[rows].to(dtype).exp(), targets.tail_mass_N[rows].to(dtype)
        )

    def _mixed(self, targets: MixedTargets, rows: slice) -> DenseLabel:
        """The logarithm of the mean of probabilities; the mean of logits would be another, sharper distribution."""
        heat = self._terms.temperature
        mean_CV: torch.Tensor | None = None
        for part, weight in zip(self._parts, targets.weights, strict=True):
            label = part.of(rows)
            assert isinstance(label, DenseLabel)
            logprobs_CV = torch.log_softmax(label.scores_CV / heat, dim=1).add_(math.log(weight))
            mean_CV = logprobs_CV if mean_CV is None else torch.logaddexp(mean_CV, logprobs_CV)
        assert mean_CV is not None
        return DenseLabel(mean_CV.mul_(heat), tempered=heat != 1)

    def _universal(self, targets: UniversalTargets, rows: slice) -> UniversalLabel | None:
        labelled = slice(bisect_left(targets.rows, rows.start), bisect_left(targets.rows, rows.stop))
        if labelled.start == labelled.stop:
            return None
        label = self._whole_or_top_k(targets.labels, labelled)
        if isinstance(label, DenseLabel):
            probs_MV = torch.softmax(label.scores_CV / self._terms.temperature, dim=1)
            ranked_MK, tail_M = probs_MV.sort(dim=1, descending=True).values, None
        else:
            ranked_MK, tail_M = label.probs_CK.sort(dim=1, descending=True).values, label.tail_C
        rows_M = torch.tensor(targets.rows[labelled], device=ranked_MK.device) - rows.start
        return UniversalLabel(rows_M, ranked_MK, tail_M)


def _sampled(targets: SampledTargets, rows: slice, *, dtype: torch.dtype) -> SampledLabel:
    offsets = targets.offsets[rows.start : rows.stop + 1]
    entries = slice(offsets[0], offsets[-1])
    ids_M = targets.ids_M[entries]
    lengths_C = torch.tensor(offsets).diff().to(ids_M.device)
    rows_M = torch.repeat_interleave(lengths_C, output_size=len(ids_M))
    return SampledLabel(rows_M, ids_M, targets.weights_M[entries].to(dtype))
