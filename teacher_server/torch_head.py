"""The output head on the teacher's device: hidden states at label positions become labels, a few rows at a time.

Shape suffixes: N label positions, C rows of a chunk, D hidden size, V vocabulary, K kept tokens.
"""

from typing import Any

import ml_dtypes
import numpy as np
import torch

from services.contract.errors import InvalidInputError, UnsupportedError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions
from services.contract.soft_labels import Array, ExactLabels, FullLabels, SoftLabels, TopKLabels
from services.models.logit_shape import logit_scale, soft_cap

_CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time: 64 MiB in float32."""

_BLOCK_ROWS = 16_384


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

    def to_numpy(self) -> LmHead:
        """The wire form, in the model's own type."""
        return LmHead(
            weight_VD=to_numpy(self.weight_VD),
            bias_V=None if self.bias_V is None else to_numpy(self.bias_V),
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
        )

    def labels(
        self, hidden_ND: torch.Tensor, *, token_ids_N: torch.Tensor, options: LabelOptions
    ) -> tuple[Array, SoftLabels]:
        """Log-probabilities of the actual tokens, float32 [N] at temperature 1, and the labels."""
        chunk = max(1, _CHUNK_ELEMENTS // len(self.weight_VD))
        token_logprobs: list[torch.Tensor] = []
        parts: list[tuple[torch.Tensor, ...]] = []
        # At least one chunk, so that a sequence without label positions has arrays of the right width.
        for start in range(0, max(1, len(hidden_ND)), chunk):
            logits_CV = self.logits(hidden_ND[start : start + chunk])
            tokens_C = token_ids_N[start : start + chunk]
            chosen_C = logits_CV.gather(1, tokens_C[:, None])[:, 0]
            token_logprobs.append(chosen_C - logits_CV.logsumexp(dim=1))
            if options.encoding == "top_k":
                parts.append(_top_k(logits_CV, options))
            elif options.encoding == "full":
                parts.append((logits_CV.log_softmax(dim=1).half(),))
        logprobs_N = to_numpy(torch.cat(token_logprobs))
        if options.encoding == "exact":
            return logprobs_N, ExactLabels(hidden_ND=to_numpy(hidden_ND))
        columns = [to_numpy(torch.cat(column)) for column in zip(*parts, strict=True)]
        if options.encoding == "full":
            return logprobs_N, FullLabels(logprobs_NV=columns[0])
        return logprobs_N, TopKLabels(ids_NK=columns[0], logprobs_NK=columns[1], tail_mass_N=columns[2])

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Float32 logits [C, V]: products of 16-bit weights are summed in float32 and never rounded to 16 bits."""
        if self.weight_VD.dtype == torch.float32:
            logits_CV = hidden_CD @ self.weight_VD.T
        elif self.weight_VD.is_cuda:
            logits_CV = torch.mm(hidden_CD, self.weight_VD.T, out_dtype=torch.float32)
        else:
            blocks = self.weight_VD.split(_BLOCK_ROWS)
            logits_CV = torch.cat([hidden_CD.float() @ block.float().T for block in blocks], dim=1)
        if self.bias_V is not None:
            logits_CV = logits_CV + self.bias_V.float()
        logits_CV = logits_CV * self.logit_scale
        if self.soft_cap:
            logits_CV = self.soft_cap * torch.tanh(logits_CV / self.soft_cap)
        return logits_CV


def to_numpy(tensor: torch.Tensor) -> Array:
    """A NumPy array of the same type, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def _top_k(logits_CV: torch.Tensor, options: LabelOptions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Float64, and the tail summed from the tail itself: 1 - sum loses a tail of 1e-9.
    logprobs_CV = (logits_CV.double() / options.temperature).log_softmax(dim=1)
    kept = logprobs_CV.topk(min(options.k, logprobs_CV.shape[1]), dim=1)
    tail_mass_C = logprobs_CV.exp().scatter(1, kept.indices, 0.0).sum(dim=1)
    return kept.indices.int(), kept.values.half(), tail_mass_C.float()
