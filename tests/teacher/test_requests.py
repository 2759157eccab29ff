"""Every request that must be refused, sent over the wire, with the reason it gets."""

import math
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.contract.errors import LimitExceededError
from services.contract.sequences import TokenSequence
from services.contract.soft_labels import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher

VOCAB = 300
MAX_LENGTH = 2000


@pytest.fixture(scope="module")
def stub() -> Iterator[TeacherServiceStub]:
    options = TeacherOptions(model=str(VOCAB), engine="mock", port=0, max_length=MAX_LENGTH)
    message_options = [("grpc.max_send_message_length", -1)]
    with running_teacher(options) as address, grpc.insecure_channel(address, options=message_options) as channel:
        yield TeacherServiceStub(channel)


def sequence(**fields: Any) -> pb.ScoreSequence:
    return pb.ScoreSequence(**{"id": "a", "token_ids": [1, 2, 3, 4], "label_positions": [1, 3], **fields})


def score(*sequences: pb.ScoreSequence, **fields: Any) -> pb.ScoreSequencesRequest:
    options = fields.pop("options", pb.LabelOptions(encoding=pb.ENCODING_EXACT))
    return pb.ScoreSequencesRequest(options=options, sequences=sequences or [sequence()], **fields)


def generate(*prompts: pb.GeneratePrompt, **fields: Any) -> pb.GenerateSequencesRequest:
    prompts = prompts or (pb.GeneratePrompt(id="a", token_ids=[1, 2]),)
    return pb.GenerateSequencesRequest(prompts=prompts, **{"max_new_tokens": 3, **fields})


def top_k(**fields: Any) -> pb.LabelOptions:
    return pb.LabelOptions(encoding=pb.ENCODING_TOP_K, **fields)


def sampled(**fields: Any) -> pb.LabelOptions:
    return pb.LabelOptions(encoding=pb.ENCODING_SAMPLED, **fields)


INVALID, FAILED = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
REFUSED = {
    "nothing asked": (pb.ScoreSequencesRequest(options=top_k(k=1)), INVALID, "invalid_input", "no sequences"),
    "no tokens": (score(sequence(token_ids=[])), INVALID, "invalid_input", "'a' has no tokens"),
    "id beyond the vocabulary": (score(sequence(token_ids=[1, VOCAB])), INVALID, "invalid_input", "token id 300"),
    "largest uint32 id": (score(sequence(token_ids=[1, 2**32 - 1])), INVALID, "invalid_input", "4294967295"),
    "too long": (score(sequence(token_ids=[1] * (MAX_LENGTH + 1))), INVALID, "limit_exceeded", "2001 tokens"),
    "more bytes than a request may have": (
        score(sequence(token_ids=[1] * MAX_REQUEST_BYTES)),
        INVALID,
        "limit_exceeded",
        "bytes, more than 4194304",
    ),
    "position 0": (score(sequence(label_positions=[0, 1])), INVALID, "invalid_input", "label position 0"),
    "position at the end": (score(sequence(label_positions=[4])), INVALID, "invalid_input", "outside 1 to 3"),
    "largest uint32 position": (score(sequence(label_positions=[2**32 - 1])), INVALID, "invalid_input", "outside"),
    "descending positions": (score(sequence(label_positions=[3, 1])), INVALID, "invalid_input", "do not ascend"),
    "a position twice": (score(sequence(label_positions=[2, 2])), INVALID, "invalid_input", "do not ascend"),
    "an id twice": (score(sequence(), sequence()), INVALID, "invalid_input", "twice"),
    "an empty id": (score(sequence(id="")), INVALID, "invalid_input", "0 characters"),
    "a long id": (score(sequence(id="x" * 201)), INVALID, "invalid_input", "201 characters"),
    "too many sequences": (
        score(*[sequence(id=str(number)) for number in range(1025)]),
        INVALID,
        "limit_exceeded",
        "1025 sequences",
    ),
    "the last of many is wrong": (
        score(*[sequence(id=str(number)) for number in range(99)], sequence(label_positions=[9])),
        INVALID,
        "invalid_input",
        "label position 9",
    ),
    "another fingerprint": (score(fingerprint="f00"), FAILED, "handshake", "not f00"),
    "another model": (score(model="another/model"), FAILED, "handshake", "serves 300, not another/model"),
    "no encoding": (score(options=pb.LabelOptions()), INVALID, "unsupported", "number 0"),
    "an unknown encoding": (score(options=pb.LabelOptions(encoding=99)), INVALID, "unsupported", "number 99"),
    "k of 0": (score(options=top_k()), INVALID, "invalid_input", "k is 0"),
    "k too large": (score(options=top_k(k=1025)), INVALID, "limit_exceeded", "k is 1025"),
    "k with exact": (
        score(options=pb.LabelOptions(encoding=pb.ENCODING_EXACT, k=5)),
        INVALID,
        "invalid_input",
        "k only goes with top_k",
    ),
    "temperature with exact": (
        score(options=pb.LabelOptions(encoding=pb.ENCODING_EXACT, temperature=2)),
        INVALID,
        "invalid_input",
        "temperature does not go with exact",
    ),
    "draws with top_k": (score(options=top_k(k=1, draws=3)), INVALID, "invalid_input", "draws only goes with sampled"),
    "a seed with full": (
        score(options=pb.LabelOptions(encoding=pb.ENCODING_FULL, seed=1)),
        INVALID,
        "invalid_input",
        "seed only goes with sampled",
    ),
    "a student head with exact": (
        score(options=pb.LabelOptions(encoding=pb.ENCODING_EXACT, student_head="f00")),
        INVALID,
        "invalid_input",
        "student_head only goes with projected",
    ),
    "no draws": (score(options=sampled()), INVALID, "invalid_input", "draws is 0"),
    "too many draws": (score(options=sampled(draws=1025)), INVALID, "limit_exceeded", "draws is 1025"),
    "draws at infinite temperature": (
        score(options=sampled(draws=1, temperature=math.inf)),
        INVALID,
        "invalid_input",
        "temperature inf",
    ),
    "projected without a head": (
        score(options=pb.LabelOptions(encoding=pb.ENCODING_PROJECTED)),
        INVALID,
        "invalid_input",
        "need a student head",
    ),
    "a student head that never came": (
        score(options=pb.LabelOptions(encoding=pb.ENCODING_PROJECTED, student_head="f" * 64)),
        FAILED,
        "student_head_missing",
        "no student head ffffffffffff",
    ),
    "negative temperature": (score(options=top_k(k=1, temperature=-1)), INVALID, "invalid_input", "temperature -1.0"),
    "temperature NaN": (score(options=top_k(k=1, temperature=math.nan)), INVALID, "invalid_input", "temperature nan"),
    "no prompts": (pb.GenerateSequencesRequest(max_new_tokens=3), INVALID, "invalid_input", "no sequences"),
    "an empty prompt": (generate(pb.GeneratePrompt(id="a")), INVALID, "invalid_input", "no tokens"),
    "no new tokens": (generate(max_new_tokens=0), INVALID, "invalid_input", "max_new_tokens"),
    "prompt and new tokens too long": (generate(max_new_tokens=MAX_LENGTH), INVALID, "limit_exceeded", "2 tokens"),
    "temperature that overflows": (generate(temperature=1e-300), INVALID, "invalid_input", "temperature 1e-300"),
    "label temperature that overflows": (
        score(options=top_k(k=1, temperature=1e-300)),
        INVALID,
        "invalid_input",
        "temperature 1e-300",
    ),
    "infinite temperature": (generate(temperature=math.inf), INVALID, "invalid_input", "temperature inf"),
    "a stop token beyond": (generate(stop_token_ids=[VOCAB]), INVALID, "invalid_input", "stop_token_ids"),
    "too many stop tokens": (generate(stop_token_ids=[1] * 65), INVALID, "limit_exceeded", "64 stop tokens"),
    "another model to generate": (generate(model="x"), FAILED, "handshake", "not x"),
    "another model to describe": (pb.GetTeacherRequest(model="x"), FAILED, "handshake", "not x"),
    "too many probe texts": (pb.GetTeacherRequest(probe_texts=["a"] * 65), INVALID, "limit_exceeded", "64 probe texts"),
    "a long probe text": (pb.GetTeacherRequest(probe_texts=["a" * 4097]), INVALID, "limit_exceeded", "4096"),
    "the head of another": (pb.GetLmHeadRequest(fingerprint="f00"), FAILED, "handshake", "not f00"),
}


def send(stub: TeacherServiceStub, request: Any) -> list[Any]:
    if isinstance(request, pb.GetTeacherRequest):
        return [stub.GetTeacher(request, timeout=30)]
    rpc = {
        pb.ScoreSequencesRequest: stub.ScoreSequences,
        pb.GenerateSequencesRequest: stub.GenerateSequences,
        pb.GetLmHeadRequest: stub.GetLmHead,
    }[type(request)]
    return list(rpc(request, timeout=30))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_request_is_refused_with_its_reason(case: str, stub: TeacherServiceStub) -> None:
    request, code, reason, words = REFUSED[case]
    with pytest.raises(grpc.RpcError) as caught:
        send(stub, request)
    assert caught.value.code().name == code
    assert words in caught.value.details()
    (detail,) = rpc_status.from_call(caught.value).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.reason, info.domain) == (reason, "smoothkd")
    assert info.metadata["fix"]


def test_full_labels_beyond_a_message_are_refused() -> None:
    request = score(
        sequence(token_ids=[1] * 1800, label_positions=list(range(1, 1800))),
        options=pb.LabelOptions(encoding=pb.ENCODING_FULL),
    )
    options = TeacherOptions(model="20000", engine="mock", port=0)
    with (
        running_teacher(options) as address,
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError, match="71967196 bytes") as caught,
    ):
        send(TeacherServiceStub(channel), request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_beyond_the_limit_is_refused(stub: TeacherServiceStub) -> None:
    request = pb.GetTeacherRequest(probe_texts=["x" * (MAX_MESSAGE_BYTES + 1)])
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetTeacher(request, timeout=30)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.GetTeacher(pb.GetTeacherRequest(), timeout=30).vocab_size == VOCAB


@pytest.mark.parametrize("fit", [True, False])
def test_a_part_of_a_students_head_beyond_the_limit_is_refused(stub: TeacherServiceStub, *, fit: bool) -> None:
    rows = pb.LmHeadRows(weight=pb.Tensor(data=b"x" * (MAX_REQUEST_BYTES - 100 + (0 if fit else 100))))
    with pytest.raises(grpc.RpcError) as caught:
        stub.PutStudentHead(iter([pb.PutStudentHeadRequest(rows=rows)]), timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("bytes, more than 4194304" in caught.value.details()) is not fit


def test_a_student_does_not_repeat_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its patience: neither a request beyond what gRPC takes nor an answer beyond what it takes itself."""
    options = TeacherOptions(model=str(VOCAB), engine="mock", port=0, max_length=10_000_000)
    with running_teacher(options) as address:
        asked = TokenSequence(id="a", token_ids=[VOCAB - 1] * 9_000_000, label_positions=[1])
        with (
            TeacherClient(address, patience_seconds=3600) as client,
            pytest.raises(LimitExceededError, match="too large: SERVER") as caught,
        ):
            list(client.score([asked]))
        assert "fewer or shorter sequences" in caught.value.fix
        asked = TokenSequence(id="a", token_ids=[1] * 500, label_positions=list(range(1, 500)))
        monkeypatch.setattr(
            "services.contract.teacher_channel._OPTIONS", (("grpc.max_receive_message_length", 20_000),)
        )
        with (
            TeacherClient(address, patience_seconds=3600) as client,
            pytest.raises(LimitExceededError, match="CLIENT: Received message larger than max"),
        ):
            list(client.score([asked]))


def test_good_requests_are_answered(stub: TeacherServiceStub) -> None:
    (answer,) = send(stub, score())
    assert (answer.id, list(answer.exact.hidden.shape)) == ("a", [2, 64])
    (answer,) = send(stub, score(options=top_k(k=1024)))
    assert list(answer.top_k.ids.shape) == [2, VOCAB]
