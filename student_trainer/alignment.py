"""Do soft labels belong to the tokens they were asked for?

Shape suffixes: N label positions, K kept tokens, D the teacher's hidden size, S the student's, V their vocabulary, M
positions looked at, or of sampled labels all their distinct tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from services.contract.errors import LabelMismatchError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import (
    CHECKED_POSITIONS,
    ExactLabels,
    FullLabels,
    ProjectedLabels,
    SampledLabels,
    ScoredSequence,
    SoftLabels,
    TopKLabels,
    hash_sequence,
    log_softmax,
    spread_positions,
)
from services.contract.tensors import Array
from student_trainer.student_head import StudentHead

FLOAT_TOLERANCE = 2e-3
"""Nats by which two float32 computations of one log-probability may differ, on any hardware."""

# Relative rounding error of one value: half a unit in the last place.
_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
MISALIGNED_FIX = "The teacher's labels are misaligned; training on them would teach noise. Restart the teacher."


def check_scored(
    scored: ScoredSequence,
    sequence: TokenSequence,
    *,
    options: LabelOptions,
    vocab_size: int,
    hidden_size: int,
    student_head: StudentHead | None = None,
) -> None:
    """LabelMismatchError unless hash, number of positions, encoding and widths are those asked for, tokens lie in the
    vocabulary, draws are as many as asked for, and projected labels are within the bounds of ``student_head``.
    """
    expected_hash = hash_sequence(sequence.token_ids, sequence.label_positions)
    if scored.sequence_hash != expected_hash:
        raise LabelMismatchError(
            f"the labels of sequence {sequence.id!r} were computed for other tokens or positions: "
            f"hash {scored.sequence_hash.hex()[:16]} instead of {expected_hash.hex()[:16]}",
            fix=MISALIGNED_FIX,
        )
    positions = len(sequence.label_positions)
    # Of exact labels an answer may tell fewer; how many is the teacher's choice.
    told = min(positions, len(scored.token_logprobs_P)) if options.encoding == "exact" else positions
    shapes: dict[str, tuple[int, ...]] = {"token_logprobs": (told,)}
    if options.encoding == "projected":
        assert student_head is not None, "the client asked for labels that are means of its head's rows"
        shapes["embedding"] = (positions, student_head.head.weight_VD.shape[1])
        if student_head.head.bias_V is not None:
            shapes["bias"] = (positions,)
    else:
        shapes |= _expected_shapes(options, positions=positions, vocab_size=vocab_size, hidden_size=hidden_size)
    found = {"token_logprobs": scored.token_logprobs_P.shape, **_shapes(scored.labels)}
    if found != shapes:
        raise LabelMismatchError(
            f"the labels of sequence {sequence.id!r} have the shapes {found} instead of {shapes}", fix=MISALIGNED_FIX
        )
    labels = scored.labels
    if isinstance(labels, TopKLabels):
        _check_vocabulary(labels.ids_NK, sequence, vocab_size=vocab_size)
    elif isinstance(labels, SampledLabels):
        _check_vocabulary(labels.ids_M, sequence, vocab_size=vocab_size)
        _check_draws(labels, sequence, draws=options.draws)
    elif isinstance(labels, ProjectedLabels) and student_head is not None:
        _check_means(labels, sequence, head=student_head)


def verify_token_logprobs(
    scored: ScoredSequence,
    sequence: TokenSequence,
    *,
    head: LmHead | None = None,
    temperature: float = 1.0,
    max_positions: int = CHECKED_POSITIONS,
) -> float:
    """Recompute the actual tokens' log-probabilities from the labels and compare with those the teacher sent.

    Returns the largest difference in nats over at most ``max_positions`` evenly spread positions.
    LabelMismatchError beyond the tolerance: FLOAT_TOLERANCE plus what the rounding of the labels explains (for exact
    labels six standard deviations of the rounding noise on a logit, for float16 log-probabilities their last place).
    Exact labels need the teacher's ``head``. Nothing can be compared with sampled and projected labels, or with top-k
    labels at a ``temperature`` other than 1: 0.
    """
    positions = len(sequence.label_positions)
    if positions == 0:
        return 0.0
    labels = scored.labels
    told_P = scored.token_logprobs_P.astype(np.float64)
    picked_M = np.unique(np.linspace(0, len(told_P) - 1, min(len(told_P), max_positions)).round().astype(np.int64))
    chosen_M, told_M = spread_positions(positions, told=len(told_P))[picked_M], told_P[picked_M]
    tokens_M = np.asarray(sequence.token_ids)[np.asarray(sequence.label_positions)[chosen_M]]
    if isinstance(labels, ExactLabels):
        if head is None:
            raise ValueError("exact labels are verified with the teacher's output head")
        recomputed_M, tolerance_M = _from_hidden(labels.hidden_ND[chosen_M], tokens_M, head)
    elif isinstance(labels, FullLabels):
        recomputed_M = labels.logprobs_NV[chosen_M, tokens_M].astype(np.float64)
        tolerance_M = _float16_tolerance(told_M)
    elif isinstance(labels, TopKLabels) and temperature == 1.0:
        recomputed_M, tolerance_M = _of_top_k(labels, chosen_M, tokens_M, told_M), _float16_tolerance(told_M)
    else:
        return 0.0
    found = Found(told_R=told_M, found_R=recomputed_M, tolerance_R=tolerance_M)
    worst = found.worst_mismatch()
    if worst is not None:
        raise found.mismatch(worst, sequence, place=int(chosen_M[worst]))
    return float(found.differences().max())


@contextmanager
def blaming_teacher(model: str) -> Iterator[None]:
    """Around the comparison of one teacher's labels, which a run may have of several: errors name it."""
    try:
        yield
    except LabelMismatchError as error:
        raise LabelMismatchError(
            f"of the teacher {model}: {error.what}", fix=error.fix, details={**error.details, "teacher": model}
        ) from error


@dataclass(frozen=True, kw_only=True)
class Found:
    """Log-probabilities of actual tokens: those that the teacher told, those that its labels give, and by how much the
    two may differ, in nats.
    """

    told_R: Array
    found_R: Array
    tolerance_R: Array

    def differences(self) -> Array:
        """0 where both say that a token cannot come."""
        with np.errstate(invalid="ignore"):
            return np.where(self.told_R == self.found_R, 0.0, np.abs(self.told_R - self.found_R))

    def worst_mismatch(self) -> int | None:
        """None where all agree; NaN agrees with nothing."""
        excess_R = np.nan_to_num(self.differences() - self.tolerance_R, nan=np.inf)
        worst = int(np.argmax(excess_R))
        return worst if excess_R[worst] > 0 else None

    def mismatch(self, row: int, sequence: TokenSequence, *, place: int) -> LabelMismatchError:
        """The error that names this row, which is of the label position ``place`` of ``sequence``."""
        position, difference = sequence.label_positions[place], self.differences()[row]
        return LabelMismatchError(
            f"at position {position} of sequence {sequence.id!r} the labels give token {sequence.token_ids[position]} "
            f"a log-probability that differs by {difference:.4f} from the teacher's {self.told_R[row]:.4f} "
            f"(tolerance {self.tolerance_R[row]:.4f})",
            fix=MISALIGNED_FIX,
        )


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
    size_M = np.where(np.isfinite(logprobs_M), np.abs(logprobs_M), 0.0)
    return np.asarray(FLOAT_TOLERANCE + size_M * _ROUNDING["float16"])


def _of_top_k(labels: TopKLabels, chosen_M: Array, tokens_M: Array, told_M: Array) -> Array:
    hit_MK = labels.ids_NK[chosen_M] == tokens_M[:, None]
    kept_M = np.where(hit_MK, labels.logprobs_NK[chosen_M].astype(np.float64), 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        # A token outside the top k is at most as likely as the whole tail.
        log_tail_M = np.log(labels.tail_mass_N[chosen_M].astype(np.float64))
    return np.asarray(np.where(hit_MK.any(axis=1), kept_M, np.minimum(told_M, log_tail_M)))


def _check_vocabulary(ids: Array, sequence: TokenSequence, *, vocab_size: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise LabelMismatchError(
            f"the labels of sequence {sequence.id!r} hold token ids outside 0 to {vocab_size - 1}", fix=MISALIGNED_FIX
        )


def _check_draws(labels: SampledLabels, sequence: TokenSequence, *, draws: int) -> None:
    whole = bool(labels.lengths_N.all())
    if whole and len(labels.lengths_N):
        ends_N = labels.lengths_N.cumsum(dtype=np.int64)
        drawn_N = np.diff(labels.counts_M.cumsum(dtype=np.int64)[ends_N - 1], prepend=0)
        # Tokens of one position ascend; only where a position begins may the next one be smaller.
        descends = np.diff(labels.ids_M) <= 0
        descends[ends_N[:-1] - 1] = False
        whole = bool((drawn_N == draws).all() and labels.counts_M.all() and not descends.any())
    if not whole:
        raise LabelMismatchError(
            f"the labels of sequence {sequence.id!r} are not {draws} draws per position, each token once",
            fix=MISALIGNED_FIX,
        )


def _check_means(labels: ProjectedLabels, sequence: TokenSequence, *, head: StudentHead) -> None:
    """No component of a mean is beyond the least and the most that any row of the head has."""
    slack_S = 2 * _ROUNDING["float16"] * np.maximum(np.abs(head.least_S), np.abs(head.most_S)) + 1e-6
    embedding_NS = labels.embedding_NS.astype(np.float32)
    if ((embedding_NS < head.least_S - slack_S) | (embedding_NS > head.most_S + slack_S)).any():
        raise LabelMismatchError(
            f"the labels of sequence {sequence.id!r} are no means of the rows of the student's head", fix=MISALIGNED_FIX
        )


def _expected_shapes(
    options: LabelOptions, *, positions: int, vocab_size: int, hidden_size: int
) -> dict[str, tuple[int, ...]]:
    if options.encoding == "exact":
        return {"hidden": (positions, hidden_size)}
    if options.encoding == "full":
        return {"logprobs": (positions, vocab_size)}
    if options.encoding == "sampled":
        return {"lengths": (positions,)}
    kept = min(options.k, vocab_size)
    return {"ids": (positions, kept), "logprobs": (positions, kept), "tail_mass": (positions,)}


def _shapes(labels: SoftLabels) -> dict[str, tuple[int, ...]]:
    if isinstance(labels, ExactLabels):
        return {"hidden": labels.hidden_ND.shape}
    if isinstance(labels, FullLabels):
        return {"logprobs": labels.logprobs_NV.shape}
    if isinstance(labels, SampledLabels):
        return {"lengths": labels.lengths_N.shape}
    if isinstance(labels, ProjectedLabels):
        shapes = {"embedding": labels.embedding_NS.shape}
        return shapes if labels.bias_N is None else {**shapes, "bias": labels.bias_N.shape}
    return {"ids": labels.ids_NK.shape, "logprobs": labels.logprobs_NK.shape, "tail_mass": labels.tail_mass_N.shape}
