"""Output heads on their way over the wire: rows in order, in messages of about a mebibyte.

Shape suffixes: V vocabulary, D hidden size, R rows of one message.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import Array, decode_tensor, encode_tensor

_MESSAGE_BYTES = 1024 * 1024
"""Of weights per message: gRPC streams fastest between 0.25 and 1 MiB."""


def head_rows(weight_VD: Array, bias_V: Array | None = None) -> Iterator[pb.LmHeadRows]:
    """All rows; the bias travels in the weight's type."""
    step = max(1, _MESSAGE_BYTES // (weight_VD.shape[1] * weight_VD.dtype.itemsize))
    for first in range(0, len(weight_VD), step):
        rows = pb.LmHeadRows(first_row=first, weight=encode_tensor(weight_VD[first : first + step]))
        if bias_V is not None:
            rows.bias.CopyFrom(encode_tensor(bias_V[first : first + step].astype(weight_VD.dtype, copy=False)))
        yield rows


class HeadAssembly:
    """A head as its rows arrive. ValueError from ``add`` and ``whole`` says how they are not those announced."""

    def __init__(self, *, vocab_size: int, hidden_size: int, dtype: np.dtype[Any], has_bias: bool) -> None:
        self._weight_VD = np.empty((vocab_size, hidden_size), dtype=dtype)
        self._bias_V = np.empty(vocab_size, dtype=dtype) if has_bias else None
        self._rows = 0

    def add(self, rows: pb.LmHeadRows) -> None:
        block_RD = decode_tensor(rows.weight)
        if rows.first_row != self._rows or block_RD.shape[1:] != self._weight_VD.shape[1:]:
            raise ValueError("its rows came out of order, or are of another width")
        end = self._rows + len(block_RD)
        if end > len(self._weight_VD):
            raise ValueError(f"it has more than the {len(self._weight_VD)} rows it announced")
        if block_RD.dtype != self._weight_VD.dtype:
            raise ValueError(f"its rows are {block_RD.dtype} instead of {self._weight_VD.dtype}")
        self._weight_VD[self._rows : end] = block_RD
        if self._bias_V is not None:
            bias_R = decode_tensor(rows.bias)
            if bias_R.shape != (len(block_RD),):
                raise ValueError("its bias does not have one value per row")
            self._bias_V[self._rows : end] = bias_R
        self._rows = end

    def whole(self) -> tuple[Array, Array | None]:
        """Weight and bias, once every row has come."""
        if self._rows != len(self._weight_VD):
            raise ValueError(f"only {self._rows} of {len(self._weight_VD)} rows came")
        return self._weight_VD, self._bias_V


def head_fingerprint(weight_VD: Array, bias_V: Array | None = None) -> str:
    """SHA-256 in hex over type and shape, the weight's bytes, then the bias's, in the weight's type."""
    rows, width = weight_VD.shape
    digest = hashlib.sha256(f"{weight_VD.dtype} {rows} {width} {bias_V is not None} ".encode())
    digest.update(np.ascontiguousarray(weight_VD).view(np.uint8).data)
    if bias_V is not None:
        digest.update(np.ascontiguousarray(bias_V.astype(weight_VD.dtype, copy=False)).view(np.uint8).data)
    return digest.hexdigest()
