"""A student's frozen output head on its way to teachers, which project their labels with it.

Shape suffixes: V vocabulary, S the student's hidden size.
"""

import threading
from collections.abc import Callable, Iterator

import numpy as np

from services.contract.head_rows import head_fingerprint, head_rows
from services.contract.lm_head import LmHead
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import Array, tensor_type

MOST_REPLICAS = 64
"""As many replicas of a teacher may each miss the head once."""


class StudentHead:
    """A head by its fingerprint, sent to whichever teacher does not have it. Safe to share between threads.

    ``least_S`` and ``most_S``: the bounds of its rows, and so of every mean of them; float32.
    """

    def __init__(self, head: LmHead) -> None:
        self.head = head
        self.fingerprint = head_fingerprint(head.weight_VD, head.bias_V)
        self.least_S: Array = head.weight_VD.min(axis=0).astype(np.float32)
        self.most_S: Array = head.weight_VD.max(axis=0).astype(np.float32)
        self.times_sent = 0
        self._lock = threading.Lock()

    def send(
        self, put: Callable[[Callable[[], Iterator[pb.PutStudentHeadRequest]]], object], *, missed_at: int, misses: int
    ) -> None:
        """Let ``put`` send the head, unless another thread has done so since ``times_sent`` was ``missed_at``.

        After the ``misses``-th request in a row that missed it, it goes out as often: replicas share calls in turn, and
        one that has the head already does not read it again.
        """
        with self._lock:
            if self.times_sent != missed_at:
                return
            for _ in range(misses):
                put(self._messages)
            self.times_sent += 1

    def _messages(self) -> Iterator[pb.PutStudentHeadRequest]:
        rows, width = self.head.weight_VD.shape
        yield pb.PutStudentHeadRequest(
            header=pb.StudentHeadHeader(
                fingerprint=self.fingerprint,
                dtype=tensor_type(self.head.weight_VD.dtype),
                vocab_size=rows,
                hidden_size=width,
                has_bias=self.head.bias_V is not None,
            )
        )
        for part in head_rows(self.head.weight_VD, self.head.bias_V):
            yield pb.PutStudentHeadRequest(rows=part)
