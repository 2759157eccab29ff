"""Arrays on their way: NumPy's numbers as the wire's tensors and back, bit for bit."""

import math
from typing import Any

import ml_dtypes
import numpy as np

from services.contract.errors import LabelMismatchError
from services.contract.teacher.v1 import teacher_service_pb2 as pb

Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES: dict[Any, np.dtype[Any]] = {
    pb.TENSOR_TYPE_FLOAT32: np.dtype("<f4"),
    pb.TENSOR_TYPE_FLOAT16: np.dtype("<f2"),
    pb.TENSOR_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    pb.TENSOR_TYPE_INT32: np.dtype("<i4"),
    pb.TENSOR_TYPE_UINT8: np.dtype("u1"),
    pb.TENSOR_TYPE_UINT16: np.dtype("<u2"),
}
_MOST_DIMENSIONS = 2
_TENSOR_TYPES = {dtype: number for number, dtype in _DTYPES.items()}


def encode_tensor(array: Array) -> pb.Tensor:
    """The wire form of an array of one or two dimensions, whose type has a wire type."""
    message = pb.Tensor()
    fill_tensor(message, array)
    return message


def fill_tensor(message: pb.Tensor, array: Array) -> None:
    """In place, for labels may be large and a tensor that is put into a message is copied."""
    message.dtype = tensor_type(array.dtype)
    message.shape.extend(array.shape)
    message.data = array.tobytes()


def decode_tensor(message: pb.Tensor) -> Array:
    """A read-only view of the message's bytes; LabelMismatchError when size and shape disagree, or the
    dimensions are not one or two.
    """
    dtype = tensor_dtype(message.dtype)
    # An empty array may have a shape that NumPy refuses: 0 times whatever else is 0 bytes.
    if not 1 <= len(message.shape) <= _MOST_DIMENSIONS:
        raise LabelMismatchError(
            f"a tensor has {len(message.shape)} dimensions instead of 1 to {_MOST_DIMENSIONS}",
            fix="The answer is damaged; restart the teacher.",
        )
    expected = math.prod(message.shape) * dtype.itemsize
    if len(message.data) != expected:
        raise LabelMismatchError(
            f"a tensor of shape {list(message.shape)} holds {len(message.data)} bytes instead of {expected}",
            fix="The answer is damaged; restart the teacher.",
        )
    return np.frombuffer(message.data, dtype=dtype).reshape(message.shape)


def tensor_dtype(tensor_type: int) -> np.dtype[Any]:
    """The NumPy type of a wire type; LabelMismatchError for one that this release does not know."""
    dtype = _DTYPES.get(tensor_type)
    if dtype is None:
        raise LabelMismatchError(
            f"a tensor has the unknown type {tensor_type}",
            fix="Teacher and student run different releases of smoothkd; update the older one.",
        )
    return dtype


def tensor_type(dtype: np.dtype[Any]) -> Any:
    """The wire type of a NumPy type out of float32, float16, bfloat16, int32, uint8, uint16."""
    return _TENSOR_TYPES[dtype]
