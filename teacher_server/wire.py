"""From what an engine computed to the messages that carry it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from services.contract.errors import TeacherError
from services.contract.head_rows import head_rows
from services.contract.lm_head import LmHead
from services.contract.soft_labels import (
    ExactLabels,
    ProjectedLabels,
    ScoredSequence,
    encode_labels,
)
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import tensor_type


def encode_scored(scored: ScoredSequence, *, label_dtype: str) -> pb.ScoreSequencesResponse:
    """The reply for one sequence; TeacherError when its hidden states do not fit the type they travel in."""
    if isinstance(scored.labels, ExactLabels):
        scored = replace(scored, labels=as_label_dtype(scored.labels, label_dtype))
    elif isinstance(scored.labels, ProjectedLabels):
        scored = replace(scored, labels=_projected_as(scored.labels, label_dtype))
    return encode_labels(scored)


def as_label_dtype(labels: ExactLabels, label_dtype: str) -> ExactLabels:
    """Hidden states rounded to the type in which they travel."""
    with np.errstate(over="ignore"):
        hidden_ND = labels.hidden_ND.astype(numpy_dtype(label_dtype), copy=False)
    if not np.isfinite(hidden_ND).all():
        raise TeacherError(
            f"the teacher's hidden states are not finite in {label_dtype}",
            fix="Serve the labels in bfloat16 or float32, and check the teacher's weights.",
        )
    return ExactLabels(hidden_ND=hidden_ND)


def encode_head(head: LmHead) -> Iterator[pb.GetLmHeadResponse]:
    """The header, then the rows in messages of about a mebibyte."""
    rows, width = head.weight_VD.shape
    dtype = head.weight_VD.dtype
    yield pb.GetLmHeadResponse(
        header=pb.LmHeadHeader(
            dtype=tensor_type(dtype),
            vocab_size=rows,
            hidden_size=width,
            has_bias=head.bias_V is not None,
            logit_scale=head.logit_scale,
            soft_cap=head.soft_cap,
        )
    )
    for part in head_rows(head.weight_VD, head.bias_V):
        yield pb.GetLmHeadResponse(rows=part)


def projected_dtype(label_dtype: str) -> str:
    """Means of a head's rows need no range beyond the rows' own, so that float16 carries them best in 16 bits."""
    return "float32" if label_dtype == "float32" else "float16"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """float32, float16 or bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _projected_as(labels: ProjectedLabels, label_dtype: str) -> ProjectedLabels:
    with np.errstate(over="ignore"):
        embedding_NS = labels.embedding_NS.astype(projected_dtype(label_dtype), copy=False)
    if not np.isfinite(embedding_NS).all():
        raise TeacherError(
            "the projected labels are not finite in float16",
            fix="Serve labels in float32 (--label-dtype float32), and check the student's output head.",
        )
    return replace(labels, embedding_NS=embedding_NS)
