"""Several teachers behind one address."""

import contextlib
import logging
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest

from services.contract.errors import HandshakeError, InvalidInputError, TeacherUnavailableError
from services.contract.sequences import LabelOptions
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from student_trainer.alignment import verify_token_logprobs
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import (
    free_port,
    health_of,
    long_sequences,
    running_teacher,
    teacher_process,
    wait_until,
)


def mock(vocab_size: int) -> TeacherOptions:
    return TeacherOptions(model=str(vocab_size), engine="mock", port=0)


def models_that_answer(client: TeacherClient, *, calls: int = 20) -> list[str]:
    ask = client._stub.GetTeacher
    return [ask(pb.GetTeacherRequest(), wait_for_ready=True, timeout=30).model for _ in range(calls)]


@pytest.mark.parametrize("spelling", ["ipv4:{0},{1}", "{0},{1}", "{0}, {1}", "localhost:{2},127.0.0.1:{3}"])
def test_requests_go_to_every_replica_in_turn(spelling: str) -> None:
    # Two different models, so that the answer says who gave it.
    with running_teacher(mock(300)) as first, running_teacher(mock(301)) as second:
        ports = [address.rpartition(":")[2] for address in (first, second)]
        with TeacherClient(spelling.format(first, second, *ports)) as client:
            wait_until(lambda: Counter(models_that_answer(client)) == {"300": 10, "301": 10})


def test_ipv4_and_ipv6_replicas_stand_in_one_list() -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"needs IPv6 on loopback: {error}")
    options = TeacherOptions(model="301", engine="mock", host="::1", port=0)
    with running_teacher(mock(300)) as first, running_teacher(options) as second:
        address = f"{first},[::1]:{second.rpartition(':')[2]}"
        with TeacherClient(address) as client:
            wait_until(lambda: set(models_that_answer(client)) == {"300", "301"})


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:1,other", "a:1,b:0", "a:1,,b:2", "::1:1,::1:2", "a:1,b:99999", "localhost:1,"),
        *("localhost", "localhost:99999", "::1:8442", "http://localhost:8442", "tls://localhost", "a b:1"),
    ],
)
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(InvalidInputError, match="is not host:port"):
        TeacherClient(address)


def test_hosts_that_nobody_knows_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TeacherUnavailableError, match=r"one\.invalid"):
        TeacherClient("one.invalid:8442,two.invalid:8442")
    with running_teacher(mock(300)) as address, TeacherClient(f"{address},one.invalid:8442") as client:
        assert len(list(client.score(long_sequences(2)))) == 2
    assert "one.invalid" in caplog.text


def test_a_replica_that_drains_gets_no_calls(tmp_path: Path) -> None:
    """Both say what they are; one is stopped while it still has work, so that its port stays open."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    options = {"model": "301", "engine": "mock", "port": port, "mock_seconds": 0.05}
    with (
        running_teacher(mock(300)) as first,
        teacher_process(options, log=tmp_path / "log") as process,
        TeacherClient(address, patience_seconds=60) as busy,
        TeacherClient(f"{first},{address}") as client,
    ):
        stream = busy.score(long_sequences(60))
        next(stream)
        wait_until(lambda: set(models_that_answer(client)) == {"300", "301"})
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: health_of(address) != "SERVING")
        wait_until(lambda: models_that_answer(client) == ["300"] * 20, seconds=10)
        assert len(list(stream)) == 59


@pytest.mark.slow
def test_killing_and_restarting_a_replica_loses_and_repeats_nothing(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    made = [{"model": "300", "engine": "mock", "port": port, "mock_seconds": 0.02} for port in ports]
    sequences = long_sequences(150)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(teacher_process(options, log=tmp_path / "log")) for options in made]
        for address in addresses:
            wait_until(lambda address=address: health_of(address) == "SERVING", seconds=60)
        client = stack.enter_context(TeacherClient(",".join(addresses), patience_seconds=60))
        head = client.fetch_lm_head()
        answered = []
        for labels in client.score(sequences):
            answered.append(labels)
            # Each in turn, and then both at once: the student waits until one is back.
            killed = {10: [0], 40: [1], 80: [0, 1]}.get(len(answered), [])
            for index in killed:
                processes[index].send_signal(signal.SIGKILL)
                processes[index].wait()
            for index in killed:
                processes[index] = stack.enter_context(teacher_process(made[index], log=tmp_path / "log"))
    assert Counter(labels.id for labels in answered) == Counter(sequence.id for sequence in sequences)
    by_id = {sequence.id: sequence for sequence in sequences}
    for labels in answered:
        verify_token_logprobs(labels, by_id[labels.id], head=head)


def test_a_replica_with_other_weights_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with running_teacher(mock(300)) as right, running_teacher(mock(301)) as wrong:
        with TeacherClient(right) as knows:
            info = knows.describe()
        with TeacherClient(f"{right},{wrong}", patience_seconds=30) as client:
            wait_until(lambda: len(set(models_that_answer(client))) == 2)
            client._info = info
            for _ in range(5):
                scored = list(client.score(long_sequences(3), LabelOptions()))
                assert sorted(answer.id for answer in scored) == ["s0", "s1", "s2"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    port = wrong.rpartition(":")[2]
    (warning,) = [message for message in warnings if "other replicas" in message]
    assert f"{socket.gethostname()}:{port}" in warning
    assert "serves 301, not 300" in warning


def test_a_replica_that_refuses_the_weights_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with (
        running_teacher(mock(300)) as right,
        running_teacher(mock(301)) as wrong,
        TeacherClient(f"{right},{wrong}", patience_seconds=30) as client,
    ):
        assert client.load_model("300") == "300"
        port = wrong.rpartition(":")[2]
        assert f"going on without the replica {socket.gethostname()}:{port}: " in caplog.text
        for _ in range(5):
            scored = list(client.score(long_sequences(3), LabelOptions()))
            assert sorted(answer.id for answer in scored) == ["s0", "s1", "s2"]
        with pytest.raises(InvalidInputError, match="sees no directory"):
            client.load_model("nowhere")


def test_only_replicas_with_other_weights_end_in_that_error() -> None:
    with running_teacher(mock(300)) as right, TeacherClient(right) as knows:
        info = knows.describe()
    with (
        running_teacher(mock(301)) as one,
        running_teacher(mock(302)) as other,
        TeacherClient(f"{one},{other}", patience_seconds=1) as client,
    ):
        client._info = info
        with pytest.raises(HandshakeError, match="not 300") as caught:
            list(client.score(long_sequences(1)))
    assert caught.value.details["replica"].startswith(socket.gethostname())
