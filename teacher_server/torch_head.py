"""The output head on the teacher's device: hidden states at label positions become labels, a few rows at a time.

Shape suffixes: N label positions, C rows of a chunk, D hidden size, V vocabulary, K kept tokens, M draws,
S a student's hidden size.
"""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

from services.contract.errors import InvalidInputError, UnsupportedError
from services.contract.lm_head import LmHead
from services.contract.reference_labels import count_draws, label_uniforms
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import (
    ExactLabels,
    FullLabels,
    ProjectedLabels,
    ScoredSequence,
    SoftLabels,
    TopKLabels,
    checked_positions,
    hash_sequence,
)
from services.contract.tensors import Array
from services.models.head_product import float32_blocks, float32_product
from services.models.logit_shape import logit_scale, soft_cap
from teacher_server.student_heads import StudentHeads

_CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time: 64 MiB in float32."""


class TorchHead:
    """The head of a transformers model, cut to ``vocab_size`` rows.

    UnsupportedError for a model without one, InvalidInputError when it has fewer rows than the tokenizer has ids.
    """

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        layer = model.get_output_embeddings()
        if layer is None:
            raise UnsupportedError(
                f"{type(model).__name__} has no output head", fix="Serve a causal language model as the teacher."
            )
        if layer.weight.shape[0] < vocab_size:
            raise InvalidInputError(
                f"the tokenizer has {vocab_size} ids, the model's output head only {layer.weight.shape[0]} rows",
                fix="Use the tokenizer that belongs to the model, or resize the model's embeddings.",
            )
        self.weight_VD: torch.Tensor = layer.weight.detach()[:vocab_size]
        bias = getattr(layer, "bias", None)
        self.bias_V: torch.Tensor | None = None if bias is None else bias.detach()[:vocab_size]
        config = model.config.get_text_config().to_dict()
        self.logit_scale = logit_scale(config)
        self.soft_cap = soft_cap(config)
        self.student_heads: StudentHeads[_StudentHead] = StudentHeads(self._place)

    def to_numpy(self) -> LmHead:
        """The wire form, in the model's own type."""
        return LmHead(
            weight_VD=to_numpy(self.weight_VD),
            bias_V=None if self.bias_V is None else to_numpy(self.bias_V),
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
        )

    def score(self, work: Sequence[tuple[torch.Tensor, TokenSequence, LabelOptions]]) -> list[ScoredSequence]:
        """The labels of sequences from the hidden states [T, D] of all their tokens, on any device.

        StudentHeadMissingError when ``options`` name a student head that is not here.
        """
        states = [self._states(hidden_TD, sequence) for hidden_TD, sequence, _ in work]
        exact = [place for place, (_, _, options) in enumerate(work) if options.encoding == "exact"]
        checks = self._checks([(states[place], work[place][1]) for place in exact])
        checked = dict(zip(exact, checks, strict=True))
        scored = []
        for place, ((_, sequence, options), hidden_ND) in enumerate(zip(work, states, strict=True)):
            if place in checked:
                labels: SoftLabels = ExactLabels(hidden_ND=to_numpy(hidden_ND))
                token_logprobs_P = checked[place]
            else:
                token_logprobs_P, labels = self._labels(hidden_ND.to(self.weight_VD.device), sequence, options)
            scored.append(
                ScoredSequence(
                    id=sequence.id,
                    sequence_hash=hash_sequence(sequence.token_ids, sequence.label_positions),
                    token_logprobs_P=token_logprobs_P,
                    labels=labels,
                )
            )
        return scored

    def _states(self, hidden_TD: torch.Tensor, sequence: TokenSequence) -> torch.Tensor:
        """Where the states lie: of exact labels, few have to come to the head's device."""
        # The state after token p - 1 predicts token p.
        positions_N = torch.tensor(sequence.label_positions, dtype=torch.long, device=hidden_TD.device)
        return hidden_TD[positions_N - 1].to(self.weight_VD.dtype)

    def _checks(self, work: Sequence[tuple[torch.Tensor, TokenSequence]]) -> list[Array]:
        """Float32 [P] for each: log-probabilities of the tokens that come with exact labels.

        The student computes the other logits. Reading the head costs more than these few rows of one sequence do, so
        that those of all sequences share its products.
        """
        if not work:
            return []
        rows, tokens = [], []
        for hidden_ND, sequence in work:
            checked_P = checked_positions(len(hidden_ND), "exact")
            rows.append(hidden_ND[torch.from_numpy(checked_P).to(hidden_ND.device)].to(self.weight_VD.device))
            tokens.append(_label_tokens(sequence)[checked_P])
        tokens_R = torch.from_numpy(np.concatenate(tokens)).to(self.weight_VD.device)
        chunk = self._chunk_rows()
        logprobs_R = torch.cat(
            [
                _token_logprobs(self.logits(hidden_CD), tokens_C)
                for hidden_CD, tokens_C in zip(torch.cat(rows).split(chunk), tokens_R.split(chunk), strict=True)
            ]
        )
        return [to_numpy(part) for part in logprobs_R.split([len(part) for part in tokens])]

    def _labels(
        self, hidden_ND: torch.Tensor, sequence: TokenSequence, options: LabelOptions
    ) -> tuple[Array, SoftLabels]:
        """Log-probabilities of the actual tokens, float32 [N] at temperature 1, and labels that need all logits."""
        device = hidden_ND.device
        tokens_N = torch.from_numpy(_label_tokens(sequence)).to(device)
        uniforms_NM = torch.empty(0)
        if options.encoding == "sampled":
            drawn = label_uniforms(options.seed, sequence.token_ids, sequence.label_positions, draws=options.draws)
            uniforms_NM = torch.from_numpy(drawn).to(device)
        head = self.student_heads.get(options.student_head) if options.encoding == "projected" else None
        chunk = self._chunk_rows()
        token_logprobs: list[torch.Tensor] = []
        parts: list[tuple[torch.Tensor, ...]] = []
        # At least one chunk, so that a sequence without label positions has arrays of the right width.
        for start in range(0, max(1, len(hidden_ND)), chunk):
            rows = slice(start, start + chunk)
            logits_CV = self.logits(hidden_ND[rows])
            token_logprobs.append(_token_logprobs(logits_CV, tokens_N[rows]))
            if options.encoding == "top_k":
                parts.append(_top_k(logits_CV, options))
            elif options.encoding == "full":
                parts.append((logits_CV.log_softmax(dim=1).half(),))
            elif options.encoding == "sampled":
                parts.append((_draw(logits_CV, uniforms_NM[rows], options),))
            elif head is not None:
                parts.append(head.means(_probabilities(logits_CV, options).float()))
        logprobs_N = to_numpy(torch.cat(token_logprobs))
        columns = [to_numpy(torch.cat(column)) for column in zip(*parts, strict=True)]
        if options.encoding == "full":
            return logprobs_N, FullLabels(logprobs_NV=columns[0])
        if options.encoding == "sampled":
            return logprobs_N, count_draws(columns[0])
        if options.encoding == "projected":
            return logprobs_N, ProjectedLabels(embedding_NS=columns[0], bias_N=columns[1] if len(columns) > 1 else None)
        return logprobs_N, TopKLabels(ids_NK=columns[0], logprobs_NK=columns[1], tail_mass_N=columns[2])

    def _chunk_rows(self) -> int:
        return max(1, _CHUNK_ELEMENTS // len(self.weight_VD))

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Float32 logits [C, V]: products of 16-bit weights are summed in float32 and never rounded to 16 bits."""
        logits_CV = float32_product(hidden_CD, self.weight_VD)
        if self.bias_V is not None:
            logits_CV = logits_CV + self.bias_V.float()
        logits_CV = logits_CV * self.logit_scale
        if self.soft_cap:
            logits_CV = self.soft_cap * torch.tanh(logits_CV / self.soft_cap)
        return logits_CV

    def _place(self, head: LmHead) -> "_StudentHead":
        device = self.weight_VD.device
        return _StudentHead(
            _from_numpy(head.weight_VD).to(device),
            None if head.bias_V is None else _from_numpy(head.bias_V).to(device, torch.float32),
        )


class _StudentHead:
    """A student's head on the teacher's device, in the type it came in."""

    def __init__(self, weight_VS: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        self._weight_VS = weight_VS
        self._bias_V = bias_V

    def means(self, probs_CV: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean row [C, S], and mean bias [C] where there is one, in float32."""
        mean_CS = probs_CV.new_zeros(len(probs_CV), self._weight_VS.shape[1])
        start = 0
        for block in float32_blocks(self._weight_VS):
            mean_CS.addmm_(probs_CV[:, start : start + len(block)], block)
            start += len(block)
        return (mean_CS,) if self._bias_V is None else (mean_CS, probs_CV @ self._bias_V)


def to_numpy(tensor: torch.Tensor) -> Array:
    """A NumPy array of the same type, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def _label_tokens(sequence: TokenSequence) -> Array:
    """Int64 [N]: the actual token at each label position."""
    return np.asarray(sequence.token_ids, dtype=np.int64)[np.asarray(sequence.label_positions, dtype=np.int64)]


def _token_logprobs(logits_CV: torch.Tensor, tokens_C: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy(logits_CV, tokens_C, reduction="none")


def _top_k(logits_CV: torch.Tensor, options: LabelOptions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Float64, and the tail summed from the tail itself: 1 - sum loses a tail of 1e-9.
    logprobs_CV = (logits_CV.double() / options.temperature).log_softmax(dim=1)
    kept = logprobs_CV.topk(min(options.k, logprobs_CV.shape[1]), dim=1)
    tail_mass_C = logprobs_CV.exp().scatter(1, kept.indices, 0.0).sum(dim=1)
    return kept.indices.int(), kept.values.half(), tail_mass_C.float()


def _from_numpy(array: Array) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _probabilities(logits_CV: torch.Tensor, options: LabelOptions) -> torch.Tensor:
    return (logits_CV.double() / options.temperature).softmax(dim=1)


def _draw(logits_CV: torch.Tensor, uniforms_CM: torch.Tensor, options: LabelOptions) -> torch.Tensor:
    """See ``reference_labels.sampled_labels``."""
    cumulative_CV = _probabilities(logits_CV, options).cumsum(dim=1)
    return torch.searchsorted(cumulative_CV, uniforms_CM * cumulative_CV[:, -1:], right=True).int()
