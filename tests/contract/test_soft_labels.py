"""The soft-label codec: every encoding bit for bit, every damage refused."""

import contextlib
import hashlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from services.contract.errors import LabelMismatchError
from services.contract.soft_labels import (
    ExactLabels,
    FullLabels,
    ProjectedLabels,
    SampledLabels,
    ScoredSequence,
    SoftLabels,
    TopKLabels,
    checked_positions,
    decode_labels,
    encode_labels,
    hash_sequence,
    log_softmax,
    spread_positions,
)
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import decode_tensor, encode_tensor

STATE_TYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
counts = st.integers(0, 9)
widths = st.integers(1, 40)


def random_bits(draw: st.DrawFn, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Finite values of every size, subnormal ones and both zeros included."""
    size = int(np.prod(shape)) * dtype.itemsize
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=dtype).reshape(shape).copy()
    with np.errstate(invalid="ignore"):
        array[~np.isfinite(array)] = -0.0
    return array


@st.composite
def scored_sequences(draw: st.DrawFn) -> ScoredSequence:
    positions, width = draw(counts), draw(widths)
    labels: SoftLabels
    encoding = draw(st.sampled_from(["exact", "top_k", "full", "sampled", "projected"]))
    if encoding == "exact":
        labels = ExactLabels(hidden_ND=random_bits(draw, (positions, width), draw(st.sampled_from(STATE_TYPES))))
    elif encoding == "top_k":
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=positions * width, max_size=positions * width))
        labels = TopKLabels(
            ids_NK=np.array(ids, dtype=np.int32).reshape(positions, width),
            logprobs_NK=random_bits(draw, (positions, width), np.dtype(np.float16)),
            tail_mass_N=random_bits(draw, (positions,), np.dtype(np.float32)),
        )
    elif encoding == "sampled":
        lengths = np.array(draw(st.lists(st.integers(0, 9), min_size=positions, max_size=positions)), dtype=np.uint16)
        distinct = int(lengths.sum())
        labels = SampledLabels(
            ids_M=random_bits(draw, (distinct,), np.dtype(np.int32)),
            counts_M=random_bits(draw, (distinct,), draw(st.sampled_from([np.dtype(np.uint8), np.dtype(np.uint16)]))),
            lengths_N=lengths,
        )
    elif encoding == "projected":
        labels = ProjectedLabels(
            embedding_NS=random_bits(draw, (positions, width), draw(st.sampled_from(STATE_TYPES))),
            bias_N=random_bits(draw, (positions,), np.dtype(np.float32)) if draw(st.booleans()) else None,
        )
    else:
        labels = FullLabels(logprobs_NV=random_bits(draw, (positions, width), np.dtype(np.float16)))
    return ScoredSequence(
        id=draw(st.text(st.characters(exclude_categories=("Cs",)), max_size=20)),
        sequence_hash=draw(st.binary(min_size=32, max_size=32)),
        token_logprobs_P=random_bits(draw, (len(checked_positions(positions, encoding)),), np.dtype(np.float32)),
        labels=labels,
    )


def arrays(scored: ScoredSequence) -> list[np.ndarray]:
    return [scored.token_logprobs_P, *(part for part in vars(scored.labels).values() if part is not None)]


@given(scored_sequences())
def test_every_encoding_comes_back_bit_for_bit(scored: ScoredSequence) -> None:
    wire = encode_labels(scored).SerializeToString()
    back = decode_labels(pb.ScoreSequencesResponse.FromString(wire))
    assert (back.id, back.sequence_hash) == (scored.id, scored.sequence_hash)
    assert type(back.labels) is type(scored.labels)
    for sent, received in zip(arrays(scored), arrays(back), strict=True):
        assert (sent.dtype, sent.shape) == (received.dtype, received.shape)
        assert sent.tobytes() == received.tobytes()


@given(scored_sequences(), st.data())
def test_truncated_bytes_are_refused(scored: ScoredSequence, data: st.DataObject) -> None:
    message = encode_labels(scored)
    tensors = [message.token_logprobs]
    part = getattr(message, message.WhichOneof("labels"))
    tensors += [value for _, value in part.ListFields()]
    tensors = [tensor for tensor in tensors if tensor.data]
    if not tensors:
        return
    tensor = data.draw(st.sampled_from(tensors))
    tensor.data = tensor.data[: data.draw(st.integers(0, len(tensor.data) - 1))]
    with pytest.raises(LabelMismatchError, match="bytes instead of"):
        decode_labels(message)


@given(st.binary(max_size=300))
def test_whatever_bytes_come_they_are_read_or_refused(wire: bytes) -> None:
    with contextlib.suppress(DecodeError, LabelMismatchError):
        decode_labels(pb.ScoreSequencesResponse.FromString(wire))


@given(scored_sequences())
def test_decoding_copies_nothing(scored: ScoredSequence) -> None:
    for array in arrays(decode_labels(encode_labels(scored))):
        assert not array.flags.writeable
        assert not array.flags.owndata


def exact(hidden: Any, *, logprobs: int = 1) -> pb.ScoreSequencesResponse:
    return encode_labels(
        ScoredSequence(
            id="x",
            sequence_hash=b"",
            token_logprobs_P=np.zeros(logprobs, dtype=np.float32),
            labels=ExactLabels(hidden_ND=np.array(hidden, dtype=np.float32)),
        )
    )


def test_a_signalling_nan_is_refused_without_a_warning() -> None:
    message = exact([[1.0]])
    message.exact.hidden.dtype = pb.TENSOR_TYPE_BFLOAT16
    message.exact.hidden.data = b"\x81\x7f"
    with pytest.raises(LabelMismatchError, match="not finite"):
        decode_labels(message)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_states_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(LabelMismatchError, match="not finite"):
        decode_labels(exact([[1.0, value]]))


def test_rows_must_agree_with_the_log_probabilities() -> None:
    with pytest.raises(LabelMismatchError, match=r"positions: \[1\], with 2 log-probabilities"):
        decode_labels(exact([[1.0, 2.0]], logprobs=2))


def test_an_answer_without_labels_is_refused() -> None:
    with pytest.raises(LabelMismatchError, match="'x' carries no labels"):
        decode_labels(pb.ScoreSequencesResponse(id="x"))


def sampled(*, ids: list[int], counts: list[int], lengths: list[int]) -> pb.ScoreSequencesResponse:
    labels = SampledLabels(
        ids_M=np.array(ids, dtype=np.int32),
        counts_M=np.array(counts, dtype=np.uint8),
        lengths_N=np.array(lengths, dtype=np.uint16),
    )
    logprobs = np.zeros(len(lengths), dtype=np.float32)
    return encode_labels(ScoredSequence(id="x", sequence_hash=b"", token_logprobs_P=logprobs, labels=labels))


@pytest.mark.parametrize(
    "damaged",
    [
        sampled(ids=[1, 2], counts=[1], lengths=[1, 1]),
        sampled(ids=[1], counts=[1, 1], lengths=[1, 1]),
        sampled(ids=[1, 2], counts=[1, 1], lengths=[1, 2]),
        sampled(ids=[1, 2], counts=[1, 1], lengths=[1]),
    ],
)
def test_ragged_arrays_must_agree(damaged: pb.ScoreSequencesResponse) -> None:
    with pytest.raises(LabelMismatchError, match="disagree about the number of tokens"):
        decode_labels(damaged)


def test_ragged_arrays_are_whole_numbers() -> None:
    damaged = sampled(ids=[1], counts=[1], lengths=[1])
    damaged.sampled.lengths.CopyFrom(encode_tensor(np.array([1.0], dtype=np.float32)))
    with pytest.raises(LabelMismatchError, match="disagree about the number of tokens"):
        decode_labels(damaged)


@pytest.mark.parametrize(("embedding", "bias"), [([[np.inf]], None), ([[1.0]], [np.nan])])
def test_projected_labels_that_are_not_finite_are_refused(embedding: Any, bias: Any) -> None:
    labels = ProjectedLabels(
        embedding_NS=np.array(embedding, dtype=np.float16),
        bias_N=None if bias is None else np.array(bias, dtype=np.float32),
    )
    logprobs = np.zeros(1, dtype=np.float32)
    message = encode_labels(ScoredSequence(id="x", sequence_hash=b"", token_logprobs_P=logprobs, labels=labels))
    with pytest.raises(LabelMismatchError, match="not finite"):
        decode_labels(message)


def test_sampled_labels_take_five_bytes_per_distinct_token() -> None:
    message = sampled(ids=list(range(50)) * 8, counts=[1] * 400, lengths=[50] * 8)
    assert 400 * 5 <= message.sampled.ByteSize() <= 400 * 5 + 8 * 2 + 40


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(LabelMismatchError, match="unknown type 77"):
        decode_tensor(pb.Tensor(dtype=77, shape=[1], data=b"1234"))


def test_an_impossible_token_is_allowed_in_full_labels() -> None:
    scored = ScoredSequence(
        id="x",
        sequence_hash=b"",
        token_logprobs_P=np.array([-1.0], dtype=np.float32),
        labels=FullLabels(logprobs_NV=np.array([[0.0, -np.inf]], dtype=np.float16)),
    )
    assert np.isneginf(decode_labels(encode_labels(scored)).labels.logprobs_NV[0, 1])


def test_tensors_are_little_endian_and_row_major() -> None:
    message = encode_tensor(np.array([[1, 2], [3, 4]], dtype=np.int32))
    assert message.data == struct.pack("<4i", 1, 2, 3, 4)
    assert list(message.shape) == [2, 2]


ids_and_positions = st.tuples(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.integers(0, 2**32 - 1)))


@given(ids_and_positions)
def test_the_hash_is_what_the_wire_format_says(sequence: tuple[list[int], list[int]]) -> None:
    ids, positions = sequence
    words = [len(ids), *ids, *positions]
    assert hash_sequence(ids, positions) == hashlib.sha256(struct.pack(f"<{len(words)}I", *words)).digest()


@given(ids_and_positions, ids_and_positions)
def test_different_sequences_have_different_hashes(
    one: tuple[list[int], list[int]], other: tuple[list[int], list[int]]
) -> None:
    assert (hash_sequence(*one) == hash_sequence(*other)) == (one == other)


def test_log_softmax_survives_large_logits() -> None:
    found = log_softmax(np.array([[1e4, 1e4 - 1.0, -1e4]], dtype=np.float32))
    np.testing.assert_allclose(found[0, :2], -np.log(1 + np.exp([-1.0, 1.0])), rtol=1e-12)


def test_exact_labels_are_checked_at_8_spread_positions_and_others_everywhere() -> None:
    assert checked_positions(5, "exact").tolist() == [0, 1, 2, 3, 4]
    spread = checked_positions(71, "exact")
    assert spread.tolist() == [10 * step for step in range(8)]
    assert checked_positions(9, "exact").tolist()[-1] == 8
    assert len(set(checked_positions(9, "exact").tolist())) == 8
    assert checked_positions(100, "top_k").tolist() == list(range(100))


@pytest.mark.parametrize("shape", [[], [0, 2**31, 2**31, 2**31, 2**31], [0] * 70, [1, 1, 1]], ids=len)
@pytest.mark.parametrize("which", ["logprobs", "hidden"])
def test_tensors_of_impossible_shapes_are_refused(shape: list[int], which: str) -> None:
    message = exact([[1.0]])
    tensor = message.token_logprobs if which == "logprobs" else message.exact.hidden
    tensor.ClearField("shape")
    tensor.shape.extend(shape)
    tensor.data = bytes(0 if 0 in shape else 4)
    with pytest.raises(LabelMismatchError, match=f"{len(shape)} dimensions instead of 1 to 2"):
        decode_labels(message)


@pytest.mark.parametrize(("positions", "told"), [(0, 0), (1, 1), (5, 5), (40, 1), (71, 8), (1000, 32)])
def test_told_positions_are_spread_from_the_first_to_the_last(positions: int, told: int) -> None:
    places = spread_positions(positions, told=told).tolist()
    assert len(set(places)) == told
    # Python rounds halves to even, as the wire contract has it.
    assert places == [round(place * (positions - 1) / max(told - 1, 1)) for place in range(told)]
