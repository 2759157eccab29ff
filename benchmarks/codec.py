"""Encode and decode one sequence of top-k labels: packed bytes, protobuf's repeated fields, OpenAI-style JSON.

The target is at most 0.5 ms and 155 KB for 256 positions of top-100 labels.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import orjson
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from benchmarks.report import report
from services.contract.reference_labels import top_k_labels
from services.contract.soft_labels import (
    ScoredSequence,
    TopKLabels,
    decode_labels,
    encode_labels,
    hash_sequence,
)
from services.contract.teacher.v1 import teacher_service_pb2 as pb

POSITIONS, K, VOCAB_SIZE = 256, 100, 49_152
REPEATS = 20


def main() -> None:
    scored = example()
    labels = scored.labels
    assert isinstance(labels, TopKLabels)
    formats: list[tuple[str, Callable[[], bytes], Callable[[bytes], tuple[Any, Any]]]] = [
        ("packed bytes (smoothkd)", lambda: encode_labels(scored).SerializeToString(), decode_packed),
        ("protobuf repeated fields", lambda: encode_repeated(labels), decode_repeated),
        ("OpenAI-style JSON, orjson", lambda: encode_json(labels), decode_json),
    ]
    rows: list[dict[str, Any]] = []
    for name, encode, decode in formats:
        wire = encode()
        ids_NK, logprobs_NK = decode(wire)
        assert np.array_equal(ids_NK, labels.ids_NK)
        assert np.allclose(logprobs_NK, labels.logprobs_NK, atol=1e-3)
        encoding, decoding = milliseconds(encode), milliseconds(partial(decode, wire))
        rows.append({"format": name, "encode ms": encoding, "decode ms": decoding, "KB": len(wire) / 1000})
    ours = rows[0]["encode ms"] + rows[0]["decode ms"]
    for row in rows:
        row["times ours"] = (row["encode ms"] + row["decode ms"]) / ours
    report("codec", title=f"{POSITIONS} positions of top-{K} labels, one sequence", rows=rows)


def example() -> ScoredSequence:
    """Labels of random logits, seeded."""
    random = np.random.default_rng(0)
    logits_NV = (random.standard_normal((POSITIONS, VOCAB_SIZE)) * 3).astype(np.float32)
    ids, positions = list(range(POSITIONS + 1)), list(range(1, POSITIONS + 1))
    return ScoredSequence(
        id="0",
        sequence_hash=hash_sequence(ids, positions),
        token_logprobs_P=np.zeros(POSITIONS, dtype=np.float32),
        labels=top_k_labels(logits_NV, K),
    )


def milliseconds(work: Callable[[], Any]) -> float:
    """Median time of one call."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def decode_packed(wire: bytes) -> tuple[Any, Any]:
    labels = decode_labels(pb.ScoreSequencesResponse.FromString(wire)).labels
    assert isinstance(labels, TopKLabels)
    return labels.ids_NK, labels.logprobs_NK


def encode_repeated(labels: TopKLabels) -> bytes:
    message = _Repeated(ids=labels.ids_NK.ravel(), logprobs=labels.logprobs_NK.astype(np.float32).ravel())
    return bytes(message.SerializeToString())


def decode_repeated(wire: bytes) -> tuple[Any, Any]:
    message = _Repeated.FromString(wire)
    ids_NK = np.array(message.ids, dtype=np.int32).reshape(POSITIONS, K)
    return ids_NK, np.array(message.logprobs, dtype=np.float32).reshape(POSITIONS, K)


def encode_json(labels: TopKLabels) -> bytes:
    """As ``prompt_logprobs`` of a vLLM server answers: one mapping per position, from token id to log-probability."""
    answer = [
        {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": f"<{token}>"}
            for rank, (token, logprob) in enumerate(zip(ids_K, logprobs_K, strict=True), start=1)
        }
        for ids_K, logprobs_K in zip(labels.ids_NK.tolist(), labels.logprobs_NK.tolist(), strict=True)
    ]
    return orjson.dumps({"prompt_logprobs": answer})


def decode_json(wire: bytes) -> tuple[Any, Any]:
    answer = orjson.loads(wire)["prompt_logprobs"]
    ids_NK = np.array([[int(token) for token in position] for position in answer], dtype=np.int32)
    logprobs_NK = np.array([[entry["logprob"] for entry in position.values()] for position in answer], dtype=np.float32)
    return ids_NK, logprobs_NK


def _repeated_message() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="repeated.proto", package="benchmark", syntax="proto3")
    message = file.message_type.add(name="Labels")
    field = descriptor_pb2.FieldDescriptorProto
    message.field.add(name="ids", number=1, type=field.TYPE_UINT32, label=field.LABEL_REPEATED)
    message.field.add(name="logprobs", number=2, type=field.TYPE_FLOAT, label=field.LABEL_REPEATED)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("benchmark.Labels"))


_Repeated = _repeated_message()

if __name__ == "__main__":
    main()
