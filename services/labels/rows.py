"""A scored sequence as a row of Parquet that any reader of Parquet understands: arrays as bytes with type and shape."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from services.contract.sequences import TokenSequence
from services.contract.soft_labels import ScoredSequence, decode_labels, encode_labels, hash_sequence
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import Array, encode_tensor, tensor_dtype, tensor_type

SCHEMA = pa.schema(
    [
        pa.field("sequence_hash", pa.binary(32), nullable=False),
        pa.field("token_ids", pa.list_(pa.uint32()), nullable=False),
        pa.field("label_positions", pa.list_(pa.uint32()), nullable=False),
        pa.field("token_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("encoding", pa.string(), nullable=False),
        pa.field(
            "labels",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("dtype", pa.string()),
                        ("shape", pa.list_(pa.uint32())),
                        ("data", pa.large_binary()),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("checksum", pa.binary(16), nullable=False),
    ]
)
"""``checksum``: BLAKE2b over the labels and token log-probabilities; ``sequence_hash`` covers ids and positions."""


class DamagedRowError(Exception):
    """The row does not hold what was written; the message says why."""


class UnknownLabelsError(Exception):
    """The row holds what was written, and this release does not know what that is; the message says what."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSequence:
    """A sequence with its labels as they travel; the message has no id."""

    token_ids: Array
    label_positions: Array
    message: pb.ScoreSequencesResponse

    @property
    def scored(self) -> ScoredSequence:
        """The labels as arrays; LabelMismatchError where they do not fit each other."""
        return decode_labels(self.message)


def to_row(sequence: TokenSequence, scored: ScoredSequence) -> dict[str, Any]:
    """The columns of SCHEMA; ``scored`` must belong to ``sequence``."""
    assert scored.sequence_hash == hash_sequence(sequence.token_ids, sequence.label_positions)
    message = encode_labels(scored)
    encoding = str(message.WhichOneof("labels"))
    labels = [
        {
            "name": field.name,
            "dtype": tensor_dtype(tensor.dtype).name,
            "shape": list(tensor.shape),
            "data": tensor.data,
        }
        for field, tensor in getattr(message, encoding).ListFields()
    ]
    logprobs_N = np.ascontiguousarray(scored.token_logprobs_P, dtype=np.float32)
    return {
        "sequence_hash": scored.sequence_hash,
        "token_ids": np.asarray(sequence.token_ids, dtype=np.uint32),
        "label_positions": np.asarray(sequence.label_positions, dtype=np.uint32),
        "token_logprobs": logprobs_N,
        "encoding": encoding,
        "labels": labels,
        "checksum": _checksum(encoding, labels, logprobs_N),
    }


def from_row(row: Mapping[str, Any]) -> LabelledSequence:
    """A row of arrays and plain values; DamagedRowError where hash or checksum is not that of its content,
    UnknownLabelsError where its labels are of no kind that this release knows.
    """
    token_ids, label_positions = row["token_ids"], row["label_positions"]
    if hash_sequence(token_ids, label_positions) != row["sequence_hash"]:
        raise DamagedRowError("its tokens are not those of its hash")
    logprobs_N = np.asarray(row["token_logprobs"], dtype=np.float32)
    if _checksum(row["encoding"], row["labels"], logprobs_N) != row["checksum"]:
        raise DamagedRowError("its checksum is wrong")
    message = pb.ScoreSequencesResponse(
        sequence_hash=row["sequence_hash"], token_logprobs=encode_tensor(logprobs_N.astype("<f4", copy=False))
    )
    try:
        labels = getattr(message, row["encoding"])
        for part in row["labels"]:
            tensor = getattr(labels, part["name"])
            tensor.dtype = tensor_type(np.dtype(part["dtype"]))
            tensor.shape.extend(part["shape"])
            tensor.data = part["data"]
    except (AttributeError, KeyError, TypeError) as error:
        raise UnknownLabelsError(str(error)) from None
    return LabelledSequence(token_ids=token_ids, label_positions=label_positions, message=message)


def _checksum(encoding: str, labels: list[dict[str, Any]], logprobs_N: Array) -> bytes:
    digest = hashlib.blake2b(encoding.encode(), digest_size=16)
    digest.update(logprobs_N.astype("<f4", copy=False).tobytes())
    for part in labels:
        digest.update(f"\n{part['name']} {part['dtype']} {list(part['shape'])}\n".encode())
        digest.update(part["data"])
    return digest.digest()
