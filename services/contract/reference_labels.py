"""Soft labels of float logits in NumPy: what the mock teacher sends, and what every engine's labels are compared with.

Shape suffixes: N label positions, V vocabulary, K kept tokens, M draws per position, S the student's hidden size.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from services.contract.soft_labels import ProjectedLabels, SampledLabels, TopKLabels, log_softmax
from services.contract.tensors import Array

_BLOCK_ROWS = 16_384
"""Rows of a student's head that are widened to float64 at a time."""


def top_k_labels(logits_NV: Array, k: int, *, temperature: float = 1.0) -> TopKLabels:
    """Top-k labels of float logits; ``k`` above V keeps the whole vocabulary.

    The tail mass is summed from the tail itself, so that a tail of 1e-9 stays 1e-9 and is not lost in 1 - sum.
    """
    logprobs_NV = log_softmax(logits_NV, temperature=temperature)
    vocab_size = logprobs_NV.shape[1]
    k = min(k, vocab_size)
    ids_NK = np.argpartition(-logprobs_NV, k - 1, axis=1)[:, :k]
    order_NK = np.argsort(-np.take_along_axis(logprobs_NV, ids_NK, axis=1), axis=1, kind="stable")
    ids_NK = np.take_along_axis(ids_NK, order_NK, axis=1)
    tail_NV = np.exp(logprobs_NV)
    np.put_along_axis(tail_NV, ids_NK, 0.0, axis=1)
    return TopKLabels(
        ids_NK=ids_NK.astype(np.int32),
        logprobs_NK=np.take_along_axis(logprobs_NV, ids_NK, axis=1).astype(np.float16),
        tail_mass_N=tail_NV.sum(axis=1).astype(np.float32),
    )


def sampled_labels(logits_NV: Array, uniforms_NM: Array, *, temperature: float = 1.0) -> SampledLabels:
    """M draws per position, each the token in which ``uniforms_NM`` falls (see ``label_uniforms``) when the
    probabilities are laid end to end in the order of their ids.
    """
    cumulative_NV = np.exp(log_softmax(logits_NV, temperature=temperature)).cumsum(axis=1)
    tokens_NM = np.empty(uniforms_NM.shape, dtype=np.int32)
    for row, (cumulative_V, uniforms_M) in enumerate(zip(cumulative_NV, uniforms_NM, strict=True)):
        # Scaled by the sum, which rounding keeps from 1; side right, so that no token of probability 0 is drawn.
        tokens_NM[row] = np.searchsorted(cumulative_V, uniforms_M * cumulative_V[-1], side="right")
    return count_draws(tokens_NM)


def projected_labels(
    logits_NV: Array, weight_VS: Array, bias_V: Array | None = None, *, temperature: float = 1.0
) -> ProjectedLabels:
    """The mean row (float32) and bias of a student's head under the distribution, summed in float64."""
    probs_NV = np.exp(log_softmax(logits_NV, temperature=temperature))
    embedding_NS = np.zeros((len(probs_NV), weight_VS.shape[1]))
    for start in range(0, len(weight_VS), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        embedding_NS += probs_NV[:, block] @ weight_VS[block].astype(np.float64)
    return ProjectedLabels(
        embedding_NS=embedding_NS.astype(np.float32),
        bias_N=None if bias_V is None else (probs_NV @ bias_V.astype(np.float64)).astype(np.float32),
    )


def label_uniforms(seed: int, token_ids: Sequence[int], label_positions: Sequence[int], *, draws: int) -> Array:
    """The randomness of sampled labels: float64 [N, draws] in [0, 1), the same wherever it is computed.

    One Philox stream (Salmon et al., 2011) per position, keyed by SHA-256 of the seed and the sequence's tokens, so
    that a position's draws do not depend on which other positions are asked for.
    """
    digest = hashlib.sha256(np.uint64(seed).astype("<u8").tobytes())
    digest.update(np.asarray(token_ids, dtype="<u4").tobytes())
    key = int.from_bytes(digest.digest()[:16], "little")
    uniforms_NM = np.empty((len(label_positions), draws))
    for row, position in enumerate(label_positions):
        # The upper half of the 256-bit counter names the position; no stream reaches the next one's start.
        np.random.Generator(np.random.Philox(key=key, counter=position << 128)).random(out=uniforms_NM[row])
    return uniforms_NM


def count_draws(tokens_NM: Array) -> SampledLabels:
    """Distinct tokens and how often each was drawn; counts are uint8 where they all fit, else uint16."""
    draws = tokens_NM.shape[1]
    sorted_NM = np.sort(tokens_NM, axis=1)
    first_NM = np.ones(sorted_NM.shape, dtype=bool)
    first_NM[:, 1:] = sorted_NM[:, 1:] != sorted_NM[:, :-1]
    starts = np.flatnonzero(first_NM)
    counts_M = np.diff(starts, append=sorted_NM.size)
    return SampledLabels(
        ids_M=sorted_NM.ravel()[starts].astype(np.int32),
        counts_M=counts_M.astype(np.uint8 if draws <= np.iinfo(np.uint8).max else np.uint16),
        lengths_N=first_NM.sum(axis=1).astype(np.uint16),
    )
