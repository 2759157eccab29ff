"""A student's head on its way to teachers: checked on arrival, bounded in memory, sent again where it is missing."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.contract.errors import LimitExceededError, OverloadedError, StudentHeadMissingError
from services.contract.head_rows import head_fingerprint, head_rows
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from teacher_server.student_heads import StudentHeads
from tests.teacher.serving import free_port, running_teacher
from tests.teacher.test_encodings import student_head

SEQUENCE = TokenSequence(id="s", token_ids=[1, 2, 3, 4], label_positions=[1, 3])


def mock(**options: Any) -> TeacherOptions:
    return TeacherOptions(**{"model": "300", "engine": "mock", "port": 0} | options)


def projected(client: TeacherClient, head: LmHead) -> LabelOptions:
    return LabelOptions(encoding="projected", student_head=client.use_student_head(head))


def header(**changes: Any) -> pb.PutStudentHeadRequest:
    fields = {
        "fingerprint": head_fingerprint(HEAD.weight_VD),
        "dtype": pb.TENSOR_TYPE_FLOAT32,
        "vocab_size": 300,
        "hidden_size": HEAD.weight_VD.shape[1],
    }
    return pb.PutStudentHeadRequest(header=pb.StudentHeadHeader(**fields | changes))


def rows(head: LmHead) -> list[pb.PutStudentHeadRequest]:
    return [pb.PutStudentHeadRequest(rows=part) for part in head_rows(head.weight_VD, head.bias_V)]


def block(first: int, array: np.ndarray) -> pb.PutStudentHeadRequest:
    (part,) = head_rows(array)
    part.first_row = first
    return pb.PutStudentHeadRequest(rows=part)


HEAD = student_head(300)
NAN = LmHead(weight_VD=np.where(np.arange(300)[:, None] == 7, np.nan, HEAD.weight_VD).astype(np.float32))
INVALID, FAILED = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
REFUSED: dict[str, tuple[list[pb.PutStudentHeadRequest], str, str, str]] = {
    "nothing": ([], INVALID, "invalid_input", "without a header"),
    "rows first": ([*rows(HEAD), header()], INVALID, "invalid_input", "without a header"),
    "another vocabulary": ([header(vocab_size=301)], FAILED, "handshake", "301 rows, the teacher's vocabulary 300"),
    "whole numbers": ([header(dtype=pb.TENSOR_TYPE_INT32)], INVALID, "invalid_input", "int32"),
    "an unknown type": ([header(dtype=99)], INVALID, "invalid_input", "unknown type 99"),
    "no dimensions": (
        [
            header(),
            pb.PutStudentHeadRequest(rows=pb.LmHeadRows(weight=pb.Tensor(dtype=pb.TENSOR_TYPE_FLOAT32, data=bytes(4)))),
        ],
        INVALID,
        "invalid_input",
        "not whole: a tensor has 0 dimensions",
    ),
    "no width": ([header(hidden_size=0)], INVALID, "invalid_input", "width 0"),
    "endless width": ([header(hidden_size=2**32 - 1)], INVALID, "invalid_input", "width 4294967295"),
    "no fingerprint": ([header(fingerprint="")], INVALID, "invalid_input", "no SHA-256"),
    "another fingerprint": ([header(fingerprint="a" * 64), *rows(HEAD)], FAILED, "label_mismatch", "not aaaaaaaaaaaa"),
    "rows missing": ([header()], INVALID, "invalid_input", "only 0 of 300 rows"),
    "rows out of order": ([header(), block(1, HEAD.weight_VD[:5])], INVALID, "invalid_input", "out of order"),
    "rows of another width": ([header(), block(0, HEAD.weight_VD[:, :3])], INVALID, "invalid_input", "another width"),
    "too many rows": ([header(), *rows(HEAD), block(300, HEAD.weight_VD[:1])], INVALID, "invalid_input", "more than"),
    "rows of another type": (
        [header(), block(0, HEAD.weight_VD.astype(np.float16))],
        INVALID,
        "invalid_input",
        "float16",
    ),
    "no bias": ([header(has_bias=True), *rows(HEAD)], INVALID, "invalid_input", "is not whole"),
    "two headers": ([header(), header()], INVALID, "invalid_input", "is not whole"),
    "NaN": (
        [header(fingerprint=head_fingerprint(NAN.weight_VD)), *rows(NAN)],
        INVALID,
        "invalid_input",
        "not finite",
    ),
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_teacher(mock()) as address:
        yield address


@pytest.fixture(scope="module")
def stub(address: str) -> Iterator[TeacherServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield TeacherServiceStub(channel)


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_head_is_refused_with_its_reason(case: str, stub: TeacherServiceStub) -> None:
    messages, code, reason, words = REFUSED[case]
    with pytest.raises(grpc.RpcError) as caught:
        stub.PutStudentHead(iter(messages), timeout=30)
    assert caught.value.code().name == code
    assert words in caught.value.details()
    (detail,) = rpc_status.from_call(caught.value).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.reason, info.domain) == (reason, "smoothkd")


def test_a_head_that_is_too_large_to_keep_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(StudentHeads.__init__.__kwdefaults__, "max_bytes", HEAD.weight_VD.nbytes - 1)
    never = threading.Event()

    def stalled() -> Iterator[pb.PutStudentHeadRequest]:
        yield header()
        never.wait(30)

    with running_teacher(mock()) as address, TeacherClient(address) as client:
        with pytest.raises(LimitExceededError, match=f"takes {HEAD.weight_VD.nbytes} bytes"):
            list(client.score([SEQUENCE], projected(client, HEAD)))
        with pytest.raises(grpc.RpcError) as caught:
            client._stub.PutStudentHead(stalled(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    never.set()


def test_a_head_that_is_there_is_not_read_again(address: str, stub: TeacherServiceStub) -> None:
    stub.PutStudentHead(iter([header(), *rows(HEAD)]), timeout=30)
    never = threading.Event()

    def stalled() -> Iterator[pb.PutStudentHeadRequest]:
        yield header()
        never.wait(30)

    assert stub.PutStudentHead(stalled(), timeout=20) == pb.PutStudentHeadResponse()
    never.set()


def test_a_client_that_dies_in_mid_stream_leaves_no_room_taken(stub: TeacherServiceStub) -> None:
    other = student_head(300, seed=5)
    begun = header(fingerprint=head_fingerprint(other.weight_VD))
    stop = threading.Event()

    def stalled() -> Iterator[pb.PutStudentHeadRequest]:
        yield begun
        stop.wait(30)

    call = stub.PutStudentHead.future(stalled(), timeout=0.3)
    assert call.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stop.set()
    stub.PutStudentHead(iter([begun, *rows(other)]), timeout=30)


def test_the_least_recently_used_head_makes_room() -> None:
    heads = StudentHeads(lambda head: head, max_bytes=2 * HEAD.weight_VD.nbytes)
    for name in ("a", "b"):
        heads.put(name, HEAD)
    heads.get("a")
    heads.put("c", HEAD)
    assert [name in heads for name in "abc"] == [True, False, True]
    with pytest.raises(StudentHeadMissingError, match="no student head b"):
        heads.get("b")
    heads.put("large", LmHead(weight_VD=np.zeros((600, HEAD.weight_VD.shape[1]), np.float32)))
    assert [name in heads for name in ("a", "c", "large")] == [False, False, True]


def test_heads_are_asked_for_while_another_is_brought_to_its_device() -> None:
    placing, placed = threading.Event(), threading.Event()

    def place(head: LmHead) -> LmHead:
        placing.set()
        assert placed.wait(30)
        return head

    heads = StudentHeads(place)
    arriving = threading.Thread(target=lambda: heads.put("arriving", HEAD))
    arriving.start()
    assert placing.wait(30)
    asked = threading.Thread(target=lambda: heads.width_if_here("arriving"))
    asked.start()
    asked.join(10)
    waited = asked.is_alive()
    placed.set()
    for thread in (asked, arriving):
        thread.join(30)
    assert not waited
    assert heads.width("arriving") == HEAD.weight_VD.shape[1]


def test_heads_that_arrive_share_the_room() -> None:
    heads = StudentHeads(lambda head: head, max_bytes=100)
    with heads.room_for(60):
        with pytest.raises(OverloadedError) as caught, heads.room_for(60):
            pass
        assert float(caught.value.details["retry_after_seconds"]) > 0
        with heads.room_for(40):
            pass
    with heads.room_for(100):
        pass


def test_a_restarted_teacher_gets_the_head_again() -> None:
    port = free_port()
    with running_teacher(mock(port=port)) as address:
        client = TeacherClient(address, patience_seconds=20)
        options = projected(client, HEAD)
        (before,) = client.score([SEQUENCE], options)
        assert client._student_head.times_sent == 1
        list(client.score([SEQUENCE], options))
        assert client._student_head.times_sent == 1
    with running_teacher(mock(port=port)), client:
        (after,) = client.score([SEQUENCE], options)
        assert client._student_head.times_sent == 2
    np.testing.assert_array_equal(before.labels.embedding_NS, after.labels.embedding_NS)


def test_a_head_that_was_dropped_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two students whose heads have room for one take turns; each gets its own labels every time."""
    monkeypatch.setitem(StudentHeads.__init__.__kwdefaults__, "max_bytes", HEAD.weight_VD.nbytes)
    with (
        running_teacher(mock()) as address,
        TeacherClient(address, patience_seconds=10) as one,
        TeacherClient(address, patience_seconds=10) as other,
    ):
        students = [(one, projected(one, HEAD)), (other, projected(other, student_head(300, seed=1)))]
        found = [
            [next(iter(client.score([SEQUENCE], options))).labels.embedding_NS for client, options in students]
            for _ in range(3)
        ]
        assert [client._student_head.times_sent for client, _ in students] == [3, 3]
    for again in found[1:]:
        np.testing.assert_array_equal(again, found[0])
    assert not np.array_equal(found[0][0], found[0][1])


def test_many_threads_send_the_head_once() -> None:
    with running_teacher(mock()) as address, TeacherClient(address, patience_seconds=10) as client:
        options = projected(client, HEAD)
        client.describe()
        results: list[Any] = []
        threads = [threading.Thread(target=lambda: results.extend(client.score([SEQUENCE], options))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(results) == 8
        assert client._student_head.times_sent == 1


@pytest.mark.parametrize("replicas", [2, 3])
def test_every_replica_gets_the_head(replicas: int) -> None:
    with ExitStack() as stack:
        addresses = [stack.enter_context(running_teacher(mock())) for _ in range(replicas)]
        client = stack.enter_context(TeacherClient(f"ipv4:{','.join(addresses)}", patience_seconds=20))
        options = projected(client, HEAD)
        found = [next(iter(client.score([SEQUENCE], options))).labels.embedding_NS for _ in range(20)]
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


def test_the_teacher_says_what_it_offers() -> None:
    for label_dtype, number in (("auto", pb.TENSOR_TYPE_BFLOAT16), ("float32", pb.TENSOR_TYPE_FLOAT32)):
        with (
            running_teacher(mock(label_dtype=label_dtype)) as address,
            grpc.insecure_channel(address) as channel,
        ):
            answer = TeacherServiceStub(channel).GetTeacher(pb.GetTeacherRequest(), timeout=30)
        assert answer.max_draws == 1024
        assert answer.label_dtype == number
        assert set(answer.encodings) == set(pb.Encoding.values()) - {0}
