"""The product of hidden states and an output head, as precise as the weights are.

Shape suffixes: C rows, D hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**21
"""Of a 16-bit head, turned into float32 at a time: 8 MiB, which a processor's cache holds until they are used."""


def float32_product(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T, float32 [C, V]; both in one type, and 16-bit ones are never rounded to 16 bits again."""
    if weight_VD.dtype == torch.float32:
        return hidden_CD @ weight_VD.T
    if weight_VD.is_cuda:
        return torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32)
    hidden_CD = hidden_CD.float()
    product_CV = hidden_CD.new_empty((len(hidden_CD), len(weight_VD)))
    start = 0
    for block in float32_blocks(weight_VD):
        product_CV[:, start : start + len(block)] = hidden_CD @ block.T
        start += len(block)
    return product_CV


def float32_blocks(weight_VD: Tensor) -> Iterator[Tensor]:
    """The rows of a head in float32, a few at a time."""
    rows = max(1, _BLOCK_ELEMENTS // weight_VD.shape[1])
    for start in range(0, len(weight_VD), rows):
        yield weight_VD[start : start + rows].float()
