"""Who may use a teacher: real servers, certificates of real authorities, every rpc."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from services.api.preflight import probe_teacher
from services.cli.health import teacher_problem
from services.contract.errors import (
    AuthenticationError,
    CancelledError,
    InvalidInputError,
    TeacherUnavailableError,
    UnsupportedError,
)
from services.contract.settings import Settings
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from services.contract.teacher_channel import TeacherAccess, open_teacher_channel, teacher_access
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.certificates import Authority
from tests.teacher.serving import health_of, long_sequences, running_teacher

MOCK = TeacherOptions(model="300", engine="mock", port=0)
PATIENCE = 3600.0
RPCS = {
    "GetTeacher": lambda stub: stub.GetTeacher(pb.GetTeacherRequest()),
    "GetLmHead": lambda stub: list(stub.GetLmHead(pb.GetLmHeadRequest())),
    "ScoreSequences": lambda stub: list(stub.ScoreSequences(pb.ScoreSequencesRequest())),
    "GenerateSequences": lambda stub: list(stub.GenerateSequences(pb.GenerateSequencesRequest())),
    "PutStudentHead": lambda stub: stub.PutStudentHead(iter([pb.PutStudentHeadRequest()])),
    "LoadModel": lambda stub: stub.LoadModel(pb.LoadModelRequest()),
}
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["TeacherService"].methods]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture(scope="module")
def guarded_address() -> Iterator[str]:
    with running_teacher(MOCK, settings=Settings(teacher_token="open sesame")) as address:
        yield address


@pytest.fixture(scope="module")
def encrypted_address(ours: Authority) -> Iterator[str]:
    with running_teacher(MOCK, settings=Settings(**ours.files("127.0.0.1"))) as address:
        yield address


@pytest.fixture(scope="module")
def mutual_address(ours: Authority) -> Iterator[str]:
    with running_teacher(MOCK, settings=Settings(**ours.files("127.0.0.1"), teacher_tls_ca=ours.file)) as address:
        yield address


def scored(address: str, **settings: object) -> int:
    """How many of three sequences a student with these settings gets."""
    with TeacherClient(address, access=teacher_access(Settings(**settings)), patience_seconds=PATIENCE) as client:
        return len(list(client.score(long_sequences(3))))


@pytest.mark.parametrize("rpc", METHODS)
@pytest.mark.parametrize("token", ["", "open sesam", "open sesame2", "Open sesame"])
def test_every_rpc_wants_the_token(guarded_address: str, rpc: str, token: str) -> None:
    with (
        open_teacher_channel(guarded_address, access=TeacherAccess(token=token)) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        RPCS[rpc](TeacherServiceStub(channel))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    (detail,) = rpc_status.from_call(caught.value).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.domain, info.reason) == ("smoothkd", "unauthenticated")
    assert "open sesame" not in str(rpc_status.from_call(caught.value))


@pytest.mark.parametrize("header", ["open sesame", "Basic open sesame", "Bearer", "Bearer "])
def test_other_headers_are_refused(guarded_address: str, header: str) -> None:
    metadata = (("authorization", header),)
    with grpc.insecure_channel(guarded_address) as channel, pytest.raises(grpc.RpcError) as caught:
        TeacherServiceStub(channel).GetTeacher(pb.GetTeacherRequest(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_token_opens(guarded_address: str) -> None:
    assert scored(guarded_address, teacher_token="open sesame") == 3
    with pytest.raises(AuthenticationError, match="wants a token and the call has none") as caught:
        scored(guarded_address)
    assert "SMOOTHKD_TEACHER_TOKEN" in caught.value.fix


def test_health_is_open_and_reflection_is_not(guarded_address: str) -> None:
    assert health_of(guarded_address) == "SERVING"
    with grpc.insecure_channel(guarded_address) as channel, pytest.raises(grpc.RpcError) as caught:
        ProtoReflectionDescriptorDatabase(channel).get_services()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_api_and_the_health_check_show_the_token_too(guarded_address: str) -> None:
    settings = Settings(teacher_address=guarded_address, teacher_token="open sesame")
    assert probe_teacher(settings, model="300").engine == "mock"
    assert teacher_problem(settings) is None
    with pytest.raises(AuthenticationError, match="refuses this API"):
        probe_teacher(Settings(teacher_address=guarded_address, teacher_token="close"), model="300")


def test_labels_travel_encrypted(encrypted_address: str, ours: Authority) -> None:
    assert scored(encrypted_address, teacher_tls_ca=ours.file) == 3
    assert scored(f"tls://{encrypted_address}", teacher_tls_ca=ours.file) == 3
    # A process with the server's own settings, as a health check beside it.
    assert scored(encrypted_address, **ours.files("127.0.0.1")) == 3
    assert teacher_problem(Settings(teacher_address=encrypted_address, teacher_tls_ca=ours.file)) is None


def test_a_list_of_replicas_travels_encrypted(encrypted_address: str, ours: Authority) -> None:
    with running_teacher(MOCK, settings=Settings(**ours.files("127.0.0.1"))) as second:
        assert scored(f"{encrypted_address},{second}", teacher_tls_ca=ours.file) == 3
        assert scored(f"tls://{second},{encrypted_address}", teacher_tls_ca=ours.file) == 3


REFUSED: dict[str, tuple[str, Callable[[Authority, Authority], dict[str, object]], str, str]] = {
    "another authority": (
        "encrypted",
        lambda ours, theirs: {"teacher_tls_ca": theirs.file},
        "no authority trusted here",
        "SMOOTHKD_TEACHER_TLS_CA",
    ),
    "no TLS": ("encrypted", lambda ours, theirs: {}, "speaks TLS, and this side does not", "SMOOTHKD_TEACHER_TLS_CA"),
    "no TLS with one that demands certificates": (
        "mutual",
        lambda ours, theirs: {},
        "speaks TLS, and this side does not",
        "SMOOTHKD_TEACHER_TLS_CA",
    ),
    "TLS where there is none": (
        "guarded",
        lambda ours, theirs: {"teacher_tls_ca": ours.file},
        "speaks no TLS",
        "unset tls://",
    ),
    "no certificate of the student": (
        "mutual",
        lambda ours, theirs: {"teacher_tls_ca": ours.file},
        "demands certificates of students, and this side shows none",
        "SMOOTHKD_TEACHER_TLS_CERTIFICATE",
    ),
    "a student's certificate of another authority": (
        "mutual",
        lambda ours, theirs: {"teacher_tls_ca": ours.file, **theirs.files("student")},
        "does not accept this side's certificate",
        "signed by an authority that the teacher trusts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_says_why(
    case: str, request: pytest.FixtureRequest, ours: Authority, theirs: Authority
) -> None:
    server, made, what, fix = REFUSED[case]
    address, settings = request.getfixturevalue(f"{server}_address"), made(ours, theirs)
    # Waiting would not help: a client that did would wait for longer than a test may take.
    for asked in (address, f"{address},{address}", f"dns:///{address}"):
        with pytest.raises(TeacherUnavailableError, match=what) as caught:
            scored(asked, **settings)
        assert fix in caught.value.fix
        assert asked in caught.value.what
    with pytest.raises(TeacherUnavailableError, match=what):
        probe_teacher(Settings(teacher_address=address, **settings), model="300")
    problem = teacher_problem(Settings(teacher_address=address, **settings)) or ""
    assert what in problem
    assert fix in problem


@pytest.mark.parametrize("prefix", ["", "tls://"])
def test_one_that_only_hangs_up_may_be_a_teacher_that_is_being_killed(prefix: str) -> None:
    """It is asked again until somebody ends that."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:
        listening.settimeout(30)
        address = f"{prefix}127.0.0.1:{listening.getsockname()[1]}"
        with TeacherClient(address, patience_seconds=PATIENCE) as client:

            def hang_up() -> None:
                for _ in range(5):
                    listening.accept()[0].close()
                client.close()

            threads.submit(hang_up)
            with pytest.raises(CancelledError):
                client.describe()


def test_what_listens_there_may_be_no_teacher() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    with server, ThreadPoolExecutor(1) as threads:
        threads.submit(server.serve_forever)
        try:
            with pytest.raises(TeacherUnavailableError, match="is none: something else listens there") as caught:
                scored(f"127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    assert "SMOOTHKD_TEACHER_ADDRESS" in caught.value.fix


def test_students_with_a_certificate_need_no_token(mutual_address: str, ours: Authority) -> None:
    assert scored(mutual_address, teacher_tls_ca=ours.file, **ours.files("student")) == 3


def test_a_certificate_for_another_host_is_refused(ours: Authority) -> None:
    with (
        running_teacher(MOCK, settings=Settings(**ours.files("teacher.example"))) as address,
        pytest.raises(TeacherUnavailableError, match="for another name"),
    ):
        scored(address, teacher_tls_ca=ours.file)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_not_served_without_token_or_certificates(host: str, ours: Authority) -> None:
    options = TeacherOptions(model="300", engine="mock", port=0, host=host)
    for open_to_all in (Settings(), Settings(teacher_token=""), Settings(**ours.files("127.0.0.1"))):
        with (
            pytest.raises(AuthenticationError, match=f"would serve {host}") as caught,
            running_teacher(options, settings=open_to_all),
        ):
            pass
        assert "SMOOTHKD_TEACHER_TOKEN" in caught.value.fix


def test_a_token_in_plain_text_is_warned_of(caplog: pytest.LogCaptureFixture, ours: Authority) -> None:
    options = TeacherOptions(model="300", engine="mock", port=0, host="0.0.0.0")
    with running_teacher(options, settings=Settings(teacher_token="t")):
        assert "without encryption" in caplog.text
    caplog.clear()
    with running_teacher(options, settings=Settings(teacher_token="t", **ours.files("127.0.0.1"))):
        assert "without encryption" not in caplog.text


def _wrong_files(folder: Path, ours: Authority) -> dict[str, tuple[dict[str, Path], str]]:
    good, other = ours.files("127.0.0.1"), ours.files("other.example")
    late = ours.files("late.example", not_after=datetime.now(UTC) - timedelta(days=1))
    certificate, key = good["teacher_tls_certificate"], good["teacher_tls_key"]
    text = folder / "text.pem"
    text.write_text("no certificate")
    return {
        "absent": ({**good, "teacher_tls_key": folder / "absent.pem"}, "absent.pem cannot be read: No such file"),
        "a directory": ({**good, "teacher_tls_certificate": folder}, "cannot be read: Is a directory"),
        "mismatched": ({**good, "teacher_tls_key": other["teacher_tls_key"]}, "does not belong to the certificate"),
        "expired": (late, "ours-late.*is valid from .* and not now"),
        "no key": ({"teacher_tls_certificate": certificate}, "SMOOTHKD_TEACHER_TLS_KEY is not set, but"),
        "no certificate": ({"teacher_tls_key": key}, "SMOOTHKD_TEACHER_TLS_CERTIFICATE is not set, but"),
        "text as certificate": ({**good, "teacher_tls_certificate": text}, "holds no certificate in PEM"),
        "text as key": ({**good, "teacher_tls_key": text}, "holds no private key in PEM"),
        "text as authority": ({**good, "teacher_tls_ca": text}, "SMOOTHKD_TEACHER_TLS_CA: .* no certificate in PEM"),
    }


def test_files_that_cannot_be_used_are_refused_on_both_sides(tmp_path: Path, ours: Authority) -> None:
    for files, words in _wrong_files(tmp_path, ours).values():
        with pytest.raises(InvalidInputError, match=words), running_teacher(MOCK, settings=Settings(**files)):
            pass
        with pytest.raises(InvalidInputError, match=words):
            teacher_access(Settings(**files))


def test_an_authority_alone_is_no_server(ours: Authority) -> None:
    with (
        pytest.raises(InvalidInputError, match="no certificate of its own"),
        running_teacher(MOCK, settings=Settings(teacher_tls_ca=ours.file)),
    ):
        pass


def test_the_settings_do_not_show_the_token() -> None:
    assert "sesame" not in repr(teacher_access(Settings(teacher_token="open sesame")))


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    directory, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_of("llama-untied"), directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    options = TeacherOptions(model=str(directory), engine="transformers", port=0)
    with pytest.raises(UnsupportedError, match="code of its own") as caught, running_teacher(options):
        pass
    assert "--trust-remote-code" in caught.value.fix
    assert not ran.exists()
    with running_teacher(replace(options, trust_remote_code=True)) as address, TeacherClient(address) as client:
        assert len(list(client.score(long_sequences(2)))) == 2
    assert ran.exists()
