"""Do soft labels belong to the tokens they were asked for?

Shape suffixes: N label positions, K kept tokens, D the teacher's hidden size, V its vocabulary.
"""

import numpy as np

from services.contract.errors import LabelMismatchError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import (
    Array,
    ExactLabels,
    FullLabels,
    ScoredSequence,
    SoftLabels,
    TopKLabels,
    hash_sequence,
    log_softmax,
)

FLOAT_TOLERANCE = 2e-3
"""Nats by which two float32 computations of one log-probability may differ, on any hardware."""

# Relative rounding error of one value: half a unit in the last place.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_FIX = "The teacher's labels are misaligned; training on them would teach noise. Restart the teacher."


def check_scored(
    scored: ScoredSequence, sequence: TokenSequence, *, options: LabelOptions, vocab_size: int, hidden_size: int
) -> None:
    """LabelMismatchError unless hash, number of positions, encoding and widths are those asked for."""
    expected_hash = hash_sequence(sequence.token_ids, sequence.label_positions)
    if scored.sequence_hash != expected_hash:
        raise LabelMismatchError(
            f"the labels of sequence {sequence.id!r} were computed for other tokens or positions: "
            f"hash {scored.sequence_hash.hex()[:16]} instead of {expected_hash.hex()[:16]}",
            fix=_FIX,
        )
    positions = len(sequence.label_positions)
    shapes = _expected_shapes(options, positions=positions, vocab_size=vocab_size, hidden_size=hidden_size)
    found = {"token_logprobs": scored.token_logprobs_N.shape, **_shapes(scored.labels)}
    if found != shapes:
        raise LabelMismatchError(
            f"the labels of sequence {sequence.id!r} have the shapes {found} instead of {shapes}", fix=_FIX
        )
    if isinstance(scored.labels, TopKLabels) and positions:
        ids_NK = scored.labels.ids_NK
        if ids_NK.min() < 0 or ids_NK.max() >= vocab_size:
            raise LabelMismatchError(
                f"the labels of sequence {sequence.id!r} hold token ids outside 0 to {vocab_size - 1}", fix=_FIX
            )


def verify_token_logprobs(
    scored: ScoredSequence,
    sequence: TokenSequence,
    *,
    head: LmHead | None = None,
    temperature: float = 1.0,
    max_positions: int = 32,
) -> float:
    """Recompute the actual tokens' log-probabilities from the labels and compare with those the teacher sent.

    Returns the largest difference in nats over at most ``max_positions`` evenly spread positions.
    LabelMismatchError beyond the tolerance: FLOAT_TOLERANCE plus what the rounding of the labels explains (for exact
    labels six standard deviations of the rounding noise on a logit, for float16 log-probabilities their last place).
    Exact labels need the teacher's ``head``. Top-k labels at a ``temperature`` other than 1 cannot be compared: 0.
    """
    positions = len(sequence.label_positions)
    if positions == 0:
        return 0.0
    chosen_M = np.unique(np.linspace(0, positions - 1, min(positions, max_positions)).round().astype(np.int64))
    tokens_M = np.asarray(sequence.token_ids)[np.asarray(sequence.label_positions)[chosen_M]]
    told_M = scored.token_logprobs_N[chosen_M].astype(np.float64)
    labels = scored.labels
    if isinstance(labels, ExactLabels):
        if head is None:
            raise ValueError("exact labels are verified with the teacher's output head")
        recomputed_M, tolerance_M = _from_hidden(labels.hidden_ND[chosen_M], tokens_M, head)
        difference_M = np.abs(told_M - recomputed_M)
    elif isinstance(labels, FullLabels):
        recomputed_M = labels.logprobs_NV[chosen_M, tokens_M].astype(np.float64)
        difference_M, tolerance_M = np.abs(told_M - recomputed_M), _float16_tolerance(told_M)
    elif temperature == 1.0:
        difference_M, tolerance_M = _against_top_k(labels, chosen_M, tokens_M, told_M), _float16_tolerance(told_M)
    else:
        return 0.0
    worst = int(np.argmax(difference_M - tolerance_M))
    if difference_M[worst] > tolerance_M[worst]:
        raise LabelMismatchError(
            f"at position {sequence.label_positions[chosen_M[worst]]} of sequence {sequence.id!r} the labels give "
            f"token {tokens_M[worst]} a log-probability that differs by {difference_M[worst]:.4f} from the teacher's "
            f"{told_M[worst]:.4f} (tolerance {tolerance_M[worst]:.4f})",
            fix=_FIX,
        )
    return float(difference_M.max())


def _from_hidden(hidden_MD: Array, tokens_M: Array, head: LmHead) -> tuple[Array, Array]:
    logits_MV = head.logits(hidden_MD)
    logprobs_M = np.take_along_axis(log_softmax(logits_MV), tokens_M[:, None], axis=1)[:, 0]
    # Rounding is independent per component, so its effect on a logit adds up in squares; the actual token's
    # logit and that of the likeliest token, which rules the normaliser, both carry it.
    hidden_dtype, hidden_MD = hidden_MD.dtype, hidden_MD.astype(np.float32)
    noise_M = np.zeros(len(tokens_M))
    for rows_M in (tokens_M, logits_MV.argmax(axis=1)):
        products_MD = head.weight_VD[rows_M].astype(np.float32) * hidden_MD
        noise_M += np.sqrt((products_MD.astype(np.float64) ** 2).sum(axis=1))
    deviation = _ROUNDING[str(hidden_dtype)] / np.sqrt(3) * abs(head.logit_scale)
    return logprobs_M, FLOAT_TOLERANCE + 6 * deviation * noise_M


def _float16_tolerance(logprobs_M: Array) -> Array:
    return np.asarray(FLOAT_TOLERANCE + np.abs(logprobs_M) * _ROUNDING["float16"])


def _against_top_k(labels: TopKLabels, chosen_M: Array, tokens_M: Array, told_M: Array) -> Array:
    hit_MK = labels.ids_NK[chosen_M] == tokens_M[:, None]
    kept_M = np.where(hit_MK, labels.logprobs_NK[chosen_M].astype(np.float64), 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        # A token outside the top k is at most as likely as the whole tail.
        log_tail_M = np.log(labels.tail_mass_N[chosen_M].astype(np.float64))
    beyond_M = np.maximum(told_M - log_tail_M, 0.0)
    return np.asarray(np.where(hit_MK.any(axis=1), np.abs(told_M - kept_M), beyond_M))


def _expected_shapes(
    options: LabelOptions, *, positions: int, vocab_size: int, hidden_size: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_logprobs": (positions,)}
    if options.encoding == "exact":
        shapes["hidden"] = (positions, hidden_size)
    elif options.encoding == "full":
        shapes["logprobs"] = (positions, vocab_size)
    else:
        kept = min(options.k, vocab_size)
        shapes |= {"ids": (positions, kept), "logprobs": (positions, kept), "tail_mass": (positions,)}
    return shapes


def _shapes(labels: SoftLabels) -> dict[str, tuple[int, ...]]:
    if isinstance(labels, ExactLabels):
        return {"hidden": labels.hidden_ND.shape}
    if isinstance(labels, FullLabels):
        return {"logprobs": labels.logprobs_NV.shape}
    return {"ids": labels.ids_NK.shape, "logprobs": labels.logprobs_NK.shape, "tail_mass": labels.tail_mass_N.shape}
