"""What the client makes of a teacher that answers wrongly, of heads on disk, and of misaligned labels."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest

from services.contract.errors import InvalidInputError, LabelMismatchError, TeacherError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import (
    ExactLabels,
    ScoredSequence,
    checked_positions,
    encode_labels,
    hash_sequence,
    log_softmax,
)
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import (
    TeacherServiceServicer,
    add_TeacherServiceServicer_to_server,
)
from student_trainer.alignment import FLOAT_TOLERANCE, verify_token_logprobs
from student_trainer.teacher_client import TeacherClient
from tests.teacher.serving import REPOSITORY

SEQUENCES = [TokenSequence(id=name, token_ids=[1, 2, 3, 4], label_positions=[1, 2]) for name in ("a", "b")]
HEAD_MESSAGE_ROWS = 3


def honest_answer(message: pb.ScoreSequence) -> pb.ScoreSequencesResponse:
    count = len(message.label_positions)
    return encode_labels(
        ScoredSequence(
            id=message.id,
            sequence_hash=hash_sequence(message.token_ids, message.label_positions),
            token_logprobs_P=np.zeros(count, dtype=np.float32),
            labels=ExactLabels(hidden_ND=np.ones((count, 4), dtype=np.float32)),
        )
    )


class Liar(TeacherServiceServicer):
    """A teacher whose honest answers are spoilt on their way out."""

    def __init__(self, spoil: Callable[[list[Any]], list[Any]], head: LmHead | None = None) -> None:
        self.spoil = spoil
        self.head = head
        self.head_requests = 0

    def GetTeacher(self, request: Any, context: Any) -> pb.GetTeacherResponse:  # noqa: N802
        return pb.GetTeacherResponse(
            model="liar", fingerprint="f1", vocab_size=8, hidden_size=4, max_length=9, max_sequences=16, encodings=[1]
        )

    def ScoreSequences(self, request: Any, context: Any) -> Iterator[pb.ScoreSequencesResponse]:  # noqa: N802
        yield from self.spoil([honest_answer(message) for message in request.sequences])

    def GetLmHead(self, request: Any, context: Any) -> Iterator[pb.GetLmHeadResponse]:  # noqa: N802
        from teacher_server.wire import encode_head

        self.head_requests += 1
        yield from self.spoil(list(encode_head(self.head)))


@contextlib.contextmanager
def served(servicer: Liar, **options: Any) -> Iterator[TeacherClient]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TeacherServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with TeacherClient(f"127.0.0.1:{port}", patience_seconds=2, **options) as client:
        yield client
    server.stop(0).wait()


def change(index: int, edit: Callable[[Any], None]) -> Callable[[list[Any]], list[Any]]:
    def spoil(answers: list[Any]) -> list[Any]:
        edit(answers[index])
        return answers

    return spoil


def of_other_tokens(answer: pb.ScoreSequencesResponse) -> None:
    answer.sequence_hash = hash_sequence([1, 2, 3, 5], [1, 2])


def of_other_positions(answer: pb.ScoreSequencesResponse) -> None:
    answer.sequence_hash = hash_sequence([1, 2, 3, 4], [2, 3])


def one_row_short(answer: pb.ScoreSequencesResponse) -> None:
    answer.exact.hidden.shape[0] = 1
    answer.exact.hidden.data = answer.exact.hidden.data[:16]


def both_short(answer: pb.ScoreSequencesResponse) -> None:
    one_row_short(answer)
    answer.token_logprobs.shape[0] = 1
    answer.token_logprobs.data = answer.token_logprobs.data[:4]


def too_narrow(answer: pb.ScoreSequencesResponse) -> None:
    answer.exact.hidden.shape[1] = 2
    answer.exact.hidden.data = answer.exact.hidden.data[:16]


def not_finite(answer: pb.ScoreSequencesResponse) -> None:
    answer.exact.hidden.data = np.array([np.inf] * 8, dtype=np.float32).tobytes()


def truncated(answer: pb.ScoreSequencesResponse) -> None:
    answer.exact.hidden.data = answer.exact.hidden.data[:-1]


def of_another_encoding(answer: pb.ScoreSequencesResponse) -> None:
    answer.full.logprobs.CopyFrom(pb.Tensor(dtype=pb.TENSOR_TYPE_FLOAT16, shape=[2, 8], data=bytes(32)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change(1, of_other_tokens), "'b' were computed for other tokens or positions"),
        (change(1, of_other_positions), "'b' were computed for other tokens or positions"),
        (change(0, one_row_short), "'a' disagree about the number of positions"),
        (change(0, both_short), "'a' have the shapes"),
        (change(0, too_narrow), r"\(2, 2\)"),
        (change(0, not_finite), "not finite"),
        (change(0, truncated), "31 bytes instead of 32"),
        (change(0, of_another_encoding), "'a' have the shapes"),
        (lambda answers: answers[:1], "left out sequence 'b'"),
        (lambda answers: [answers[0], *answers], "twice, sequence 'a'"),
        (lambda answers: [honest_answer(pb.ScoreSequence(id="c"))], "unasked, or twice, sequence 'c'"),
    ],
)
def test_wrong_answers_stop_the_run(spoil: Callable[[list[Any]], list[Any]], words: str) -> None:
    with served(Liar(spoil)) as client, pytest.raises(LabelMismatchError, match=words):
        list(client.score(SEQUENCES))


def test_honest_answers_pass() -> None:
    with served(Liar(lambda answers: answers)) as client:
        assert [labels.id for labels in client.score(SEQUENCES)] == ["a", "b"]


def test_more_sequences_than_a_request_may_hold_are_split() -> None:
    sequences = [TokenSequence(id=str(index), token_ids=[1, 2], label_positions=[1]) for index in range(40)]
    sizes: list[int] = []
    with served(Liar(lambda answers: sizes.append(len(answers)) or answers)) as client:
        assert len(list(client.score(sequences))) == 40
    assert sizes == [16, 16, 8]


def test_requests_stay_below_the_size_that_a_teacher_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.teacher_requests.MAX_REQUEST_BYTES", 20_000)
    ids = [2_000_000] * 1000
    sequences = [
        TokenSequence(id=str(index), token_ids=ids[: 4 if index else 1000], label_positions=[1, 2])
        for index in range(30)
    ]
    # Larger than a request by itself, and asked for nevertheless.
    sequences.append(TokenSequence(id="large", token_ids=ids * 10, label_positions=[1, 2]))
    requests: list[list[str]] = []
    with served(Liar(lambda answers: requests.append([answer.id for answer in answers]) or answers)) as client:
        assert len(list(client.score(sequences))) == 31
    by_id = {sequence.id: sequence for sequence in sequences}
    for request in requests[:-1]:
        message = pb.ScoreSequencesRequest(
            sequences=[
                pb.ScoreSequence(id=id, token_ids=by_id[id].token_ids, label_positions=by_id[id].label_positions)
                for id in request
            ]
        )
        assert message.ByteSize() <= 20_000
    assert requests[-1] == ["large"]
    assert len(requests) <= 4


def test_an_id_asked_for_twice_is_refused() -> None:
    with (
        served(Liar(lambda answers: answers)) as client,
        pytest.raises(InvalidInputError, match="'a' is asked for twice"),
    ):
        list(client.score([SEQUENCES[0], SEQUENCES[0]]))


def test_a_failure_without_error_info_names_code_and_address() -> None:
    def fail(answers: list[Any]) -> list[Any]:
        raise RuntimeError("out of cheese")

    with served(Liar(fail)) as client, pytest.raises(TeacherError, match=r"UNKNOWN.*out of cheese") as caught:
        list(client.score(SEQUENCES))
    assert caught.value.details["address"] == client.address


def random_head(*, dtype: Any = np.float32, rows: int = 8, width: int = 4) -> LmHead:
    random = np.random.default_rng(3)
    return LmHead(
        weight_VD=random.standard_normal((rows, width)).astype(dtype),
        bias_V=random.standard_normal(rows).astype(dtype),
        logit_scale=0.25,
        soft_cap=30.0,
    )


def same_head(one: LmHead, other: LmHead) -> bool:
    return (
        one.weight_VD.dtype == other.weight_VD.dtype
        and one.weight_VD.tobytes() == other.weight_VD.tobytes()
        and (one.bias_V.tobytes() if one.bias_V is not None else None)
        == (other.bias_V.tobytes() if other.bias_V is not None else None)
        and (one.logit_scale, one.soft_cap) == (other.logit_scale, other.soft_cap)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_head_arrives_bit_for_bit_and_is_fetched_once(
    dtype: Any, has_bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.contract.head_rows._MESSAGE_BYTES", 50)
    head = random_head(dtype=dtype)
    head = head if has_bias else replace(head, bias_V=None)
    liar = Liar(lambda answers: answers, head)
    for _ in range(2):
        with served(liar, cache_dir=tmp_path / "heads") as client:
            assert same_head(client.fetch_lm_head(), head)
    assert liar.head_requests == 1
    with served(liar) as client:
        assert same_head(client.fetch_lm_head(), head)
    assert [path.name for path in (tmp_path / "heads").iterdir()] == ["f1.lm_head"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "garbage"])
def test_a_damaged_head_on_disk_is_fetched_again(damage: str, tmp_path: Path) -> None:
    head = random_head()
    liar = Liar(lambda answers: answers, head)
    with served(liar, cache_dir=tmp_path) as client:
        client.fetch_lm_head()
        path = tmp_path / "f1.lm_head"
        content = path.read_bytes()
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes({"cut": content[:-9], "flip": flipped, "empty": b"", "garbage": b"\x00{]" * 99}[damage])
        assert same_head(client.fetch_lm_head(), head)
    assert liar.head_requests == 2
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda parts: parts[:-1], "only"),
        (lambda parts: [parts[0], parts[2], parts[1], *parts[3:]], "out of order"),
        (lambda parts: parts[1:], "header is missing"),
        (lambda parts: [*parts, parts[-1]], "out of order"),
        (lambda parts: [], "nothing came"),
    ],
)
def test_an_incomplete_head_is_refused(
    spoil: Callable[[list[Any]], list[Any]], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.contract.head_rows._MESSAGE_BYTES", 32)
    with (
        served(Liar(spoil, random_head()), cache_dir=tmp_path) as client,
        pytest.raises(LabelMismatchError, match=words),
    ):
        client.fetch_lm_head()
    assert list(tmp_path.iterdir()) == []


def scored_by(head: LmHead, *, wire: Any, shift: int = 0) -> tuple[ScoredSequence, TokenSequence]:
    """Labels of random states as a teacher sends them, their log-probabilities ``shift`` tokens off."""
    random = np.random.default_rng(11)
    ids = random.integers(0, head.vocab_size, 41)
    sequence = TokenSequence(id="x", token_ids=ids.tolist(), label_positions=list(range(1, 40)))
    hidden = random.standard_normal((39, head.weight_VD.shape[1])).astype(np.float32)
    logprobs = log_softmax(head.logits(hidden))
    told = logprobs[np.arange(39), ids[1 + shift : 40 + shift]].astype(np.float32)[checked_positions(39, "exact")]
    labels = ExactLabels(hidden_ND=hidden.astype(wire))
    return ScoredSequence(id="x", sequence_hash=b"", token_logprobs_P=told, labels=labels), sequence


@pytest.mark.parametrize("wire", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("width", [16, 1024])
def test_aligned_labels_verify_and_shifted_ones_do_not(wire: Any, width: int) -> None:
    head = replace(random_head(rows=500, width=width), bias_V=None, logit_scale=16 / width**0.5)
    scored, sequence = scored_by(head, wire=wire)
    difference = verify_token_logprobs(scored, sequence, head=head)
    assert difference <= {2: 0.5, 4: FLOAT_TOLERANCE}[np.dtype(wire).itemsize]
    shifted, sequence = scored_by(head, wire=wire, shift=1)
    with pytest.raises(LabelMismatchError, match="differs by"):
        verify_token_logprobs(shifted, sequence, head=head)
    scored, sequence = scored_by(head, wire=wire)
    with pytest.raises(LabelMismatchError, match="differs by"):
        verify_token_logprobs(scored, sequence, head=replace(head, logit_scale=head.logit_scale / 2))


@pytest.mark.parametrize("encoding", ["exact", "top_k", "full"])
def test_labels_of_the_neighbouring_position_do_not_verify(encoding: Any, mock_teacher: TeacherClient) -> None:
    ids = [(31 * place) % 290 for place in range(60)]
    here = TokenSequence(id="x", token_ids=ids, label_positions=list(range(1, 59)))
    there = TokenSequence(id="x", token_ids=ids, label_positions=list(range(2, 60)))
    options = LabelOptions(encoding=encoding, k=100 if encoding == "top_k" else 0)
    head = mock_teacher.fetch_lm_head()
    (scored,), (off_by_one,) = mock_teacher.score([here], options), mock_teacher.score([there], options)
    verify_token_logprobs(scored, here, head=head)
    mixed = replace(scored, labels=off_by_one.labels)
    with pytest.raises(LabelMismatchError, match="of sequence 'x'"):
        verify_token_logprobs(mixed, here, head=head)


def test_a_client_that_another_thread_closes_just_before_a_call_is_cancelled() -> None:
    """In a process of its own, which gRPC would end with a segmentation fault."""
    code = (
        "from services.contract.errors import CancelledError\n"
        "from student_trainer.teacher_client import TeacherClient\n"
        "class ClosedInBetween(TeacherClient):\n"
        "    def _require_open(self):\n"
        "        super()._require_open()\n"
        "        self.close()\n"
        "try:\n"
        "    ClosedInBetween('127.0.0.1:1').describe()\n"
        "except CancelledError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "the connection to the teacher was closed while it was in use\n")
