"""Students' frozen output heads, which projected labels are means of: sent by students, kept while there is room.

Shape suffixes: V vocabulary, S the student's hidden size.
"""

import asyncio
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np

from services.contract.errors import (
    HandshakeError,
    InvalidInputError,
    LabelMismatchError,
    LimitExceededError,
    OverloadedError,
    StudentHeadMissingError,
)
from services.contract.head_rows import HeadAssembly, head_fingerprint
from services.contract.lm_head import LmHead
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import Array, tensor_dtype

logger = logging.getLogger(__name__)

MAX_BYTES = 4 * 2**30
"""Of all heads together; two of a student with 150,000 tokens and 7,000 components in 16 bits."""
MAX_WIDTH = 65_536
SILENCE_SECONDS = 60.0
"""A student that sends nothing for so long has gone."""

PlacedT = TypeVar("PlacedT")


class StudentHeads(Generic[PlacedT]):
    """Heads by fingerprint, the least recently used dropped for new ones. Safe to share between threads.

    ``place`` brings a head that has arrived to where it is used, the engine's device.
    """

    def __init__(self, place: Callable[[LmHead], PlacedT], *, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._place = place
        self._heads: OrderedDict[str, tuple[PlacedT, int, int]] = OrderedDict()
        self._arriving_bytes = 0
        self._lock = threading.Lock()
        self._placing = threading.Lock()

    def __contains__(self, fingerprint: str) -> bool:
        with self._lock:
            return fingerprint in self._heads

    def get(self, fingerprint: str) -> PlacedT:
        """The head where it is used; StudentHeadMissingError where it never came, or had to make room."""
        return self._entry(fingerprint)[0]

    def width(self, fingerprint: str) -> int:
        """The student's hidden size; StudentHeadMissingError as for ``get``."""
        return self._entry(fingerprint)[1]

    def width_if_here(self, fingerprint: str) -> int:
        """The student's hidden size, 0 for a head that is not here."""
        with self._lock:
            entry = self._heads.get(fingerprint)
            return 0 if entry is None else entry[1]

    def put(self, fingerprint: str, head: LmHead) -> None:
        """Keep a head that has come whole."""
        size = head.weight_VD.nbytes
        # Placing takes seconds, in which the others are asked for all the same.
        with self._placing:
            with self._lock:
                # Out before in: the device may have no room for one head more.
                while self._heads and sum(entry[2] for entry in self._heads.values()) + size > self.max_bytes:
                    dropped, _ = self._heads.popitem(last=False)
                    logger.info("dropped the student head %s to make room", dropped[:12])
            placed = self._place(head)
            with self._lock:
                self._heads[fingerprint] = (placed, head.weight_VD.shape[1], size)

    @contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """Count a head that is arriving; OverloadedError while others take the room."""
        with self._lock:
            if self._arriving_bytes + size > self.max_bytes:
                raise OverloadedError(
                    "other students' heads are arriving",
                    fix="Send this one again in a few seconds.",
                    details={"retry_after_seconds": "2"},
                )
            self._arriving_bytes += size
        try:
            yield
        finally:
            with self._lock:
                self._arriving_bytes -= size

    def _entry(self, fingerprint: str) -> tuple[PlacedT, int, int]:
        with self._lock:
            entry = self._heads.get(fingerprint)
            if entry is None:
                raise StudentHeadMissingError(
                    f"this teacher has no student head {fingerprint[:12]}",
                    fix="Send it with PutStudentHead, then ask again.",
                    details={"student_head": fingerprint[:64]},
                )
            self._heads.move_to_end(fingerprint)
            return entry


async def receive_student_head(
    parts: AsyncIterator[pb.PutStudentHeadRequest], heads: StudentHeads[Any], *, vocab_size: int
) -> None:
    """Keep the head that a student sends; one that is here already is not read to its end.

    HandshakeError when it has other than the teacher's ``vocab_size`` rows; LimitExceededError when it is too large to
    keep; LabelMismatchError when it is not what its fingerprint says; InvalidInputError when its rows do not come as
    announced or hold values that are not finite.
    """
    header = await _next(parts)
    if header is None or header.WhichOneof("part") != "header":
        raise InvalidInputError("a student head came without a header", fix="Send the header first, then the rows.")
    assembly, size = _announced(header.header, heads, vocab_size=vocab_size)
    fingerprint = header.header.fingerprint
    if fingerprint in heads:
        return
    with heads.room_for(size):
        try:
            while (part := await _next(parts)) is not None:
                assembly.add(part.rows)
            weight_VS, bias_V = assembly.whole()
        except (ValueError, LabelMismatchError) as error:
            raise InvalidInputError(
                f"the student head is not whole: {error.what if isinstance(error, LabelMismatchError) else error}",
                fix="Send all rows, in order, as the header says.",
            ) from None
        await asyncio.to_thread(_check, weight_VS, bias_V, fingerprint=fingerprint)
        await asyncio.to_thread(heads.put, fingerprint, LmHead(weight_VD=weight_VS, bias_V=bias_V))
    logger.info("keeping the student head %s, %.1f MiB", fingerprint[:12], size / 2**20)


async def _next(parts: AsyncIterator[pb.PutStudentHeadRequest]) -> pb.PutStudentHeadRequest | None:
    try:
        async with asyncio.timeout(SILENCE_SECONDS):
            return await anext(parts, None)
    except TimeoutError:
        raise InvalidInputError(
            f"nothing of the student head came for {SILENCE_SECONDS:g} seconds", fix="Send it again."
        ) from None


def _announced(header: pb.StudentHeadHeader, heads: StudentHeads[Any], *, vocab_size: int) -> tuple[HeadAssembly, int]:
    if header.vocab_size != vocab_size:
        raise HandshakeError(
            f"the student head has {header.vocab_size} rows, the teacher's vocabulary {vocab_size} tokens",
            fix="Send the rows of the vocabulary that both share, without padding.",
        )
    try:
        dtype = tensor_dtype(header.dtype)
    except LabelMismatchError as error:
        raise InvalidInputError(f"the student head cannot be read: {error.what}", fix=error.fix) from None
    # ml_dtypes' bfloat16 is of kind V.
    if dtype.kind in "iu" or not 1 <= header.hidden_size <= MAX_WIDTH:
        raise InvalidInputError(
            f"the student head is announced as {dtype} of width {header.hidden_size}",
            fix=f"Heads are float32, float16 or bfloat16 and 1 to {MAX_WIDTH} wide.",
        )
    if not re.fullmatch("[0-9a-f]{64}", header.fingerprint):
        raise InvalidInputError("the student head's fingerprint is no SHA-256", fix="Send 64 hex digits.")
    size = math.prod((header.vocab_size, header.hidden_size, dtype.itemsize))
    if size > heads.max_bytes:
        raise LimitExceededError(
            f"the student head takes {size} bytes; this teacher keeps {heads.max_bytes}",
            fix="Ask for exact labels, which need no student head.",
        )
    assembly = HeadAssembly(
        vocab_size=header.vocab_size, hidden_size=header.hidden_size, dtype=dtype, has_bias=header.has_bias
    )
    return assembly, size


def _check(weight_VS: Array, bias_V: Array | None, *, fingerprint: str) -> None:
    found = head_fingerprint(weight_VS, bias_V)
    if found != fingerprint:
        raise LabelMismatchError(
            f"the student head that came has the fingerprint {found[:12]}, not {fingerprint[:12]}",
            fix="It was damaged on its way, or changed while it was sent; send it again.",
        )
    if not (np.isfinite(weight_VS).all() and (bias_V is None or np.isfinite(bias_V).all())):
        raise InvalidInputError(
            "the student head holds values that are not finite", fix="Check the student's weights and precision."
        )
