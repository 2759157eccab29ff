"""Soft labels: the teacher's next-token distributions, and how they cross the network.

Shape suffixes: N label positions, K kept tokens, D the teacher's hidden size, V its vocabulary.

Both ends use this one codec. ``encode_labels`` and ``decode_labels`` turn labels into protobuf and back, bit for bit;
decoding copies nothing: the arrays are read-only views of the message's bytes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.contract.errors import LabelMismatchError
from services.contract.sequences import Encoding
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import Array, decode_tensor, encode_tensor, fill_tensor

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest gRPC message either end accepts: one sequence of exact labels, 8192 positions of 4096 bf16 values."""


MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Largest gRPC message a teacher accepts: 1024 sequences of 800 tokens, most of them labelled. Clients send several."""


CHECKED_POSITIONS = 8
"""Of one sequence of exact labels: as many actual tokens' log-probabilities this release sends with them. Any number is
read, so that another one here concerns neither the students of former releases nor what they have kept on disk."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactLabels:
    """Final hidden states, float32, float16 or bfloat16; the teacher's head turns them into all logits."""

    hidden_ND: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class TopKLabels:
    """The likeliest tokens with the exact mass of the rest, which stays one ghost bucket, never renormalised away.

    ``ids_NK`` int32, likeliest first; ``logprobs_NK`` float16 natural logarithms under the full softmax;
    ``tail_mass_N`` float32, the probability of all other tokens together.
    """

    ids_NK: Array
    logprobs_NK: Array
    tail_mass_N: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class FullLabels:
    """Log-probabilities of the whole vocabulary, float16."""

    logprobs_NV: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledLabels:
    """Draws with replacement from the distribution (random-sampling distillation, arXiv:2503.16870): counts divided by
    their sum estimate it without bias, its tail included.

    Ragged, M distinct tokens in all: position n has ``lengths_N[n]`` of them, after those of position n - 1.
    ``ids_M`` int32, ascending within a position; ``counts_M`` uint8 or uint16; ``lengths_N`` uint16.
    """

    ids_M: Array
    counts_M: Array
    lengths_N: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectedLabels:
    """The mean row of a student's output head under the teacher's distribution, W^T p, which is all of the labels that
    the loss of a student with that head frozen depends on.

    ``embedding_NS`` float16 or float32, S the student's hidden size; ``bias_N`` float32, the mean of the head's bias,
    or None for a head without one.
    """

    embedding_NS: Array
    bias_N: Array | None = None


SoftLabels = ExactLabels | TopKLabels | FullLabels | SampledLabels | ProjectedLabels


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredSequence:
    """A teacher's answer for one sequence.

    ``token_logprobs_P`` float32: the log-probability, at temperature 1, of the token at each of P label positions,
    which ``spread_positions`` names.
    ``sequence_hash``: see ``hash_sequence``. ``from_cache``: whether they were computed for an earlier request.
    """

    id: str
    sequence_hash: bytes
    token_logprobs_P: Array
    labels: SoftLabels
    from_cache: bool = False


def encode_labels(scored: ScoredSequence) -> pb.ScoreSequencesResponse:
    """The wire form of one scored sequence."""
    message = pb.ScoreSequencesResponse(
        id=scored.id,
        sequence_hash=scored.sequence_hash,
        token_logprobs=encode_tensor(scored.token_logprobs_P),
    )
    labels = scored.labels
    if isinstance(labels, ExactLabels):
        fill_tensor(message.exact.hidden, labels.hidden_ND)
    elif isinstance(labels, TopKLabels):
        fill_tensor(message.top_k.ids, labels.ids_NK)
        fill_tensor(message.top_k.logprobs, labels.logprobs_NK)
        fill_tensor(message.top_k.tail_mass, labels.tail_mass_N)
    elif isinstance(labels, SampledLabels):
        fill_tensor(message.sampled.ids, labels.ids_M)
        fill_tensor(message.sampled.counts, labels.counts_M)
        fill_tensor(message.sampled.lengths, labels.lengths_N)
    elif isinstance(labels, ProjectedLabels):
        fill_tensor(message.projected.embedding, labels.embedding_NS)
        if labels.bias_N is not None:
            fill_tensor(message.projected.bias, labels.bias_N)
    else:
        fill_tensor(message.full.logprobs, labels.logprobs_NV)
    return message


def decode_labels(message: pb.ScoreSequencesResponse) -> ScoredSequence:
    """One scored sequence from its wire form.

    Raises LabelMismatchError when a tensor is damaged, the arrays disagree about N, or a value is not finite.
    """
    labels, columns = _decode_encoding(message)
    token_logprobs_P = decode_tensor(message.token_logprobs)
    positions = len(columns[0])
    lengths = [len(column) for column in columns]
    told = len(token_logprobs_P)
    fewer_allowed = isinstance(labels, ExactLabels) and 0 < told < positions
    if (told != positions and not fewer_allowed) or any(length != positions for length in lengths):
        raise LabelMismatchError(
            f"the labels of sequence {message.id!r} disagree about the number of positions: {lengths}, with "
            f"{told} log-probabilities of tokens",
            fix="The answer is damaged; restart the teacher.",
        )
    for column in (token_logprobs_P, *columns):
        # A token of probability 0 has log-probability -inf; NaN is never right, and infinite states neither.
        with np.errstate(invalid="ignore"):
            wrong = np.isnan(column) if isinstance(labels, FullLabels | TopKLabels) else ~np.isfinite(column)
        if wrong.any():
            raise LabelMismatchError(
                f"the labels of sequence {message.id!r} hold values that are not finite",
                fix="Check the teacher's weights and precision: float16 overflows in some models, bfloat16 does not.",
            )
    return ScoredSequence(
        id=message.id,
        sequence_hash=message.sequence_hash,
        token_logprobs_P=token_logprobs_P,
        labels=labels,
        from_cache=message.from_cache,
    )


def _decode_encoding(message: pb.ScoreSequencesResponse) -> tuple[SoftLabels, list[Array]]:
    """The labels, and those of their arrays that have a row per position."""
    encoding = message.WhichOneof("labels")
    if encoding == "exact":
        exact = ExactLabels(hidden_ND=decode_tensor(message.exact.hidden))
        return exact, [exact.hidden_ND]
    if encoding == "top_k":
        top_k = TopKLabels(
            ids_NK=decode_tensor(message.top_k.ids),
            logprobs_NK=decode_tensor(message.top_k.logprobs),
            tail_mass_N=decode_tensor(message.top_k.tail_mass),
        )
        return top_k, [top_k.ids_NK, top_k.logprobs_NK, top_k.tail_mass_N]
    if encoding == "full":
        full = FullLabels(logprobs_NV=decode_tensor(message.full.logprobs))
        return full, [full.logprobs_NV]
    if encoding == "sampled":
        sampled = SampledLabels(
            ids_M=decode_tensor(message.sampled.ids),
            counts_M=decode_tensor(message.sampled.counts),
            lengths_N=decode_tensor(message.sampled.lengths),
        )
        _check_ragged(sampled, sequence_id=message.id)
        return sampled, [sampled.lengths_N]
    if encoding == "projected":
        has_bias = message.projected.HasField("bias")
        projected = ProjectedLabels(
            embedding_NS=decode_tensor(message.projected.embedding),
            bias_N=decode_tensor(message.projected.bias) if has_bias else None,
        )
        return projected, [projected.embedding_NS] + ([] if projected.bias_N is None else [projected.bias_N])
    raise LabelMismatchError(
        f"the answer for sequence {message.id!r} carries no labels",
        fix="Teacher and student run different releases of smoothkd; update the older one.",
    )


def _check_ragged(labels: SampledLabels, *, sequence_id: str) -> None:
    arrays = (labels.ids_M, labels.counts_M, labels.lengths_N)
    whole = all(array.ndim == 1 and array.dtype.kind in "iu" for array in arrays) and (
        len(labels.ids_M) == len(labels.counts_M) == labels.lengths_N.sum(dtype=np.int64)
    )
    if not whole:
        raise LabelMismatchError(
            f"the sampled labels of sequence {sequence_id!r} disagree about the number of tokens: "
            f"{labels.ids_M.size} ids, {labels.counts_M.size} counts, lengths that add up to "
            f"{labels.lengths_N.sum(dtype=np.float64):g}",
            fix="The answer is damaged; restart the teacher.",
        )


def checked_positions(positions: int, encoding: Encoding) -> Array:
    """Int64 [P]: which of so many label positions this release's teacher tells the actual token's log-probability of.

    All of them where the teacher computes logits anyhow; of exact labels, whose logits the student computes, at most
    CHECKED_POSITIONS, evenly spread: enough to notice labels that are shifted or of another text, and a head's whole
    product saved.
    """
    return spread_positions(positions, told=min(positions, CHECKED_POSITIONS) if encoding == "exact" else positions)


def spread_positions(positions: int, *, told: int) -> Array:
    """Int64 [P]: the label positions, counted from 0, that an answer's ``told`` log-probabilities of tokens are of."""
    return np.linspace(0, positions - 1, told).round().astype(np.int64)


def hash_sequence(token_ids: Sequence[int], label_positions: Sequence[int]) -> bytes:
    """SHA-256 that ties labels to the tokens and positions they were computed for; both ends compute it."""
    digest = hashlib.sha256(np.uint32(len(token_ids)).tobytes())
    digest.update(np.asarray(token_ids, dtype="<u4").tobytes())
    digest.update(np.asarray(label_positions, dtype="<u4").tobytes())
    return digest.digest()


def log_softmax(logits_NV: Array, *, temperature: float = 1.0) -> Array:
    """Float64 log-probabilities along the last axis."""
    scaled_NV = logits_NV.astype(np.float64) / temperature
    scaled_NV -= scaled_NV.max(axis=-1, keepdims=True)
    scaled_NV -= np.log(np.exp(scaled_NV).sum(axis=-1, keepdims=True))
    return scaled_NV


WIRE_ENCODINGS: dict[Encoding, Any] = {
    "exact": pb.ENCODING_EXACT,
    "top_k": pb.ENCODING_TOP_K,
    "full": pb.ENCODING_FULL,
    "sampled": pb.ENCODING_SAMPLED,
    "projected": pb.ENCODING_PROJECTED,
}
"""Each encoding's number on the wire."""
