"""The teacher's output head, the other half of exact labels: hidden states become logits through it.

Shape suffixes: N positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from services.contract.tensors import Array

_BLOCK_ROWS = 16_384
"""Rows of a 16-bit head that are widened to float32 at a time, so that a large one needs no second copy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LmHead:
    """logits = soft_cap * tanh((hidden @ weight.T + bias) * logit_scale / soft_cap); no cap where soft_cap is 0.

    ``weight_VD`` and ``bias_V``: float32, float16 or bfloat16, one row per token and no padding rows.
    Scale and cap as in Granite, Cohere (scale) and Gemma 2 (cap; arXiv:2408.00118, section 2).
    """

    weight_VD: Array
    bias_V: Array | None = None
    logit_scale: float = 1.0
    soft_cap: float = 0.0

    @property
    def vocab_size(self) -> int:
        return int(self.weight_VD.shape[0])

    def logits(self, hidden_ND: Array) -> Array:
        """Float32 logits [N, V] of the whole vocabulary."""
        hidden_ND = hidden_ND.astype(np.float32)
        logits_NV = np.empty((len(hidden_ND), self.vocab_size), dtype=np.float32)
        for start in range(0, self.vocab_size, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            logits_NV[:, block] = hidden_ND @ self.weight_VD[block].astype(np.float32).T
        if self.bias_V is not None:
            logits_NV += self.bias_V.astype(np.float32)
        logits_NV *= self.logit_scale
        if self.soft_cap:
            logits_NV = self.soft_cap * np.tanh(logits_NV / self.soft_cap)
        return logits_NV
