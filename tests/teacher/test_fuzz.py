"""Bytes that no honest client sends: whatever arrives, the answer is a status that blames the request."""

import contextlib
import socket
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.contract.settings import Settings
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import long_sequences, running_teacher

VOCAB = 300
SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"]
METHODS = {method.name: method for method in SERVICE.methods}
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
BUDGET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cached = Settings(label_cache_dir=tmp_path_factory.mktemp("labels"), label_cache_gib=0.01)
    options = TeacherOptions(model=str(VOCAB), engine="mock", port=0, max_length=64)
    with running_teacher(options, settings=cached) as made:
        yield made


@pytest.fixture(scope="module")
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as made:
        yield made


@pytest.fixture(scope="module")
def honest(address: str) -> Iterator[TeacherClient]:
    with TeacherClient(address, patience_seconds=5) as made:
        yield made


def status_of(channel: grpc.Channel, rpc: str, messages: list[bytes]) -> grpc.StatusCode:
    """How a call with these bytes as its messages ends."""
    path = f"/{SERVICE.full_name}/{rpc}"
    try:
        if METHODS[rpc].client_streaming:
            channel.stream_unary(path)(iter(messages), timeout=20)
        elif METHODS[rpc].server_streaming:
            list(channel.unary_stream(path)(messages[0], timeout=20))
        else:
            channel.unary_unary(path)(messages[0], timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


ids = st.integers(0, 2**32 - 1) | st.integers(0, VOCAB)
texts = st.text(max_size=8) | st.sampled_from(["", str(VOCAB), "a", "../..", "/", "a" * 300])
floats = st.floats(width=64) | st.sampled_from([0.0, 1.0, -1.0])
counts = st.integers(0, 2**32 - 1) | st.integers(0, 8)
label_options = st.builds(
    pb.LabelOptions,
    encoding=st.integers(0, 9),
    k=counts,
    temperature=floats,
    draws=counts,
    seed=st.integers(0, 2**64 - 1),
    student_head=texts,
)
sequences = st.builds(
    pb.ScoreSequence, id=texts, token_ids=st.lists(ids, max_size=70), label_positions=st.lists(ids, max_size=8)
)
tensors = st.builds(pb.Tensor, dtype=st.integers(0, 9), shape=st.lists(counts, max_size=4), data=st.binary(max_size=64))
head_messages = st.one_of(
    st.builds(
        lambda **header: pb.PutStudentHeadRequest(header=pb.StudentHeadHeader(**header)),
        model=texts,
        fingerprint=texts,
        dtype=st.integers(0, 9),
        vocab_size=counts | st.just(VOCAB),
        hidden_size=counts,
        has_bias=st.booleans(),
    ),
    st.builds(
        lambda **rows: pb.PutStudentHeadRequest(rows=pb.LmHeadRows(**rows)),
        first_row=counts,
        weight=tensors,
        bias=tensors,
    ),
    st.just(pb.PutStudentHeadRequest()),
)
REQUESTS = {
    "GetTeacher": st.builds(pb.GetTeacherRequest, model=texts, probe_texts=st.lists(texts, max_size=70)),
    "GetLmHead": st.builds(pb.GetLmHeadRequest, model=texts, fingerprint=texts),
    "ScoreSequences": st.builds(
        pb.ScoreSequencesRequest,
        model=texts,
        fingerprint=texts,
        options=label_options,
        sequences=st.lists(sequences, max_size=4),
    ),
    "GenerateSequences": st.builds(
        pb.GenerateSequencesRequest,
        model=texts,
        prompts=st.lists(st.builds(pb.GeneratePrompt, id=texts, token_ids=st.lists(ids, max_size=70)), max_size=4),
        max_new_tokens=counts,
        temperature=floats,
        seed=st.integers(0, 2**64 - 1),
        stop_token_ids=st.lists(ids, max_size=70),
    ),
    "PutStudentHead": head_messages,
    "LoadModel": st.builds(pb.LoadModelRequest, model=texts),
}
VALID = {
    "GetTeacher": pb.GetTeacherRequest(probe_texts=["a", "b"]),
    "GetLmHead": pb.GetLmHeadRequest(model=str(VOCAB)),
    "ScoreSequences": pb.ScoreSequencesRequest(
        options=pb.LabelOptions(encoding=pb.ENCODING_TOP_K, k=3),
        sequences=[pb.ScoreSequence(id=name, token_ids=[1, 2, 3, 4], label_positions=[1, 3]) for name in "ab"],
    ),
    "GenerateSequences": pb.GenerateSequencesRequest(
        prompts=[pb.GeneratePrompt(id="a", token_ids=[1, 2])], max_new_tokens=3, stop_token_ids=[7]
    ),
    "PutStudentHead": pb.PutStudentHeadRequest(
        header=pb.StudentHeadHeader(fingerprint="0" * 64, dtype=1, vocab_size=VOCAB, hidden_size=4)
    ),
    "LoadModel": pb.LoadModelRequest(model="nowhere"),
}


def test_every_rpc_is_covered() -> None:
    assert set(REQUESTS) == set(VALID) == set(METHODS)


def require_well(honest: TeacherClient) -> None:
    assert len(list(honest.score(long_sequences(2)))) == 2


@pytest.mark.parametrize("rpc", METHODS)
def test_arbitrary_bytes(rpc: str, channel: grpc.Channel, honest: TeacherClient) -> None:
    @BUDGET
    @given(st.lists(st.binary(max_size=200), min_size=1, max_size=3))
    def ends_well(messages: list[bytes]) -> None:
        code = status_of(channel, rpc, messages)
        # gRPC itself says INTERNAL of bytes that are no message; it never reaches the service.
        assert code in ALLOWED or (
            code is grpc.StatusCode.INTERNAL and not all(_parses(rpc, each) for each in messages)
        )

    ends_well()
    require_well(honest)


@pytest.mark.parametrize("rpc", METHODS)
def test_messages_of_the_right_type_with_any_content(rpc: str, channel: grpc.Channel, honest: TeacherClient) -> None:
    @BUDGET
    @given(st.lists(REQUESTS[rpc], min_size=1, max_size=3))
    def ends_well(messages: list[pb.ScoreSequencesRequest]) -> None:
        assert status_of(channel, rpc, [each.SerializeToString() for each in messages]) in ALLOWED

    ends_well()
    require_well(honest)


@pytest.mark.parametrize("rpc", METHODS)
def test_mutated_valid_requests(rpc: str, channel: grpc.Channel, honest: TeacherClient) -> None:
    valid = VALID[rpc].SerializeToString()

    @BUDGET
    @given(st.integers(0, len(valid)), st.integers(0, len(valid)), st.binary(max_size=6))
    def ends_well(first: int, last: int, instead: bytes) -> None:
        message = valid[:first] + instead + valid[last:]
        code = status_of(channel, rpc, [message])
        assert code in ALLOWED or (code is grpc.StatusCode.INTERNAL and not _parses(rpc, message))

    ends_well()
    require_well(honest)


def _parses(rpc: str, message: bytes) -> bool:
    try:
        getattr(pb, METHODS[rpc].input_type.name).FromString(message)
    except Exception:  # noqa: BLE001 - protobuf's two implementations raise different types
        return False
    return True


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: teacher\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
        b"\x00" * 4096,
    ],
)
def test_half_open_connections_leave_the_teacher_alone(greeting: bytes, address: str, honest: TeacherClient) -> None:
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(OSError):
                connection.sendall(greeting)
        # They stay open, and say no more.
        require_well(honest)
        with grpc.insecure_channel(address) as another:
            assert status_of(another, "GetTeacher", [b""]) is grpc.StatusCode.OK
    require_well(honest)


def test_an_unknown_rpc_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE.full_name}/Nothing")(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
