"""How a server lives: shared, cancelled, past its deadlines, killed and restarted."""

import contextlib
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from services.contract.errors import (
    CancelledError,
    HandshakeError,
    TeacherUnavailableError,
)
from services.contract.sequences import DecodeOptions, Prompt, TokenSequence
from student_trainer.alignment import verify_token_logprobs
from student_trainer.teacher_client import TeacherClient
from teacher_server import transformers_engine
from teacher_server.admission import Limits
from teacher_server.batching import DecodeWatch
from teacher_server.decoding import decode_batch
from teacher_server.server import TeacherOptions
from tests.teacher.serving import free_port, health_of, long_sequences, running_teacher, teacher_process, wait_until


def test_health_and_reflection_are_served(mock_address: str) -> None:
    assert health_of(mock_address) == "SERVING"
    with grpc.insecure_channel(mock_address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert set(services) >= {"teacher.v1.TeacherService", "grpc.health.v1.Health"}


def test_a_stream_survives_kill_and_restart(tmp_path: Path) -> None:
    port = free_port()
    options = {"model": "300", "engine": "mock", "port": port, "mock_seconds": 0.02}
    sequences = long_sequences(60)
    with TeacherClient(f"127.0.0.1:{port}", patience_seconds=60) as client, contextlib.ExitStack() as stack:
        first = stack.enter_context(teacher_process(options, log=tmp_path / "log"))
        head = client.fetch_lm_head()
        answered = []
        for labels in client.score(sequences):
            answered.append(labels)
            if len(answered) == 5:
                first.send_signal(signal.SIGKILL)
                first.wait()
                stack.enter_context(teacher_process(options, log=tmp_path / "log"))
    assert (tmp_path / "log").read_text().count("serving 300") == 2
    assert Counter(labels.id for labels in answered) == Counter(sequence.id for sequence in sequences)
    by_id = {sequence.id: sequence for sequence in sequences}
    for labels in answered:
        verify_token_logprobs(labels, by_id[labels.id], head=head)


def test_another_teacher_at_the_same_address_is_refused() -> None:
    port = free_port()
    with TeacherClient(f"127.0.0.1:{port}", patience_seconds=5) as client:
        with running_teacher(TeacherOptions(model="300", engine="mock", port=port)):
            stream = client.score(long_sequences(3))
            next(stream)
        with (
            running_teacher(TeacherOptions(model="301", engine="mock", port=port)),
            pytest.raises(HandshakeError, match="serves 301, not 300"),
        ):
            list(client.score(long_sequences(3)))


def test_no_teacher_is_reported_with_address_and_command() -> None:
    port = free_port()
    client = TeacherClient(f"127.0.0.1:{port}", patience_seconds=0.3)
    with client, pytest.raises(TeacherUnavailableError) as caught:
        client.describe()
    assert f"127.0.0.1:{port}" in caught.value.what
    assert "smoothkd teacher --model" in caught.value.fix


def test_cancelling_frees_the_teacher() -> None:
    options = TeacherOptions(model="300", engine="mock", port=0, mock_seconds=0.05)
    with running_teacher(options) as address, TeacherClient(address) as client:
        # All of it would take 50 s.
        stream = client.score(long_sequences(1000))
        next(stream)
        stream.close()
        started = time.monotonic()
        assert len(list(client.score(long_sequences(1)))) == 1
        assert time.monotonic() - started < 5


def test_cancelling_ends_a_decode_at_its_next_step(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TeacherOptions(model=str(model_of("llama-untied")), engine="transformers", port=0)
    # Eight batches of at most 64, at least 2000 steps in all.
    prompts = [Prompt(id=str(index), token_ids=[5 + index % 256]) for index in range(512)]
    steps = []
    with running_teacher(options) as address, TeacherClient(address) as client:

        def watched(model: object, batch: Sequence[Prompt], *rest: object, watch: DecodeWatch, **named: object) -> None:
            """Closes the client at the third step, and goes on once the batch knows that it is cancelled."""
            after_step = watch.after_step

            def third_step_cancels() -> None:
                steps.append(watch)
                after_step()
                if len(steps) == 3:
                    client.close()
                    wait_until(lambda: all(watch.is_cancelled(row) for row in range(len(batch))))

            monkeypatch.setattr(watch, "after_step", third_step_cancels)
            decode_batch(model, batch, *rest, watch=watch, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(transformers_engine, "decode_batch", watched)
        with pytest.raises(CancelledError, match="closed"):
            list(client.generate(prompts, DecodeOptions(max_new_tokens=250, stop_token_ids=(0,))))
        with TeacherClient(address) as other:
            list(other.generate(prompts[:1], DecodeOptions(max_new_tokens=1)))
    # A batch that was taken up before the others' cancellation arrived may have begun.
    assert 3 <= len(steps) <= 10


def test_a_deadline_ends_the_request_on_both_sides() -> None:
    options = TeacherOptions(model="300", engine="mock", port=0, mock_seconds=0.2)
    with running_teacher(options) as address:
        with TeacherClient(address, timeout_seconds=0.5, patience_seconds=2) as hasty:
            hasty.describe()
            with pytest.raises(TeacherUnavailableError, match="answered nothing in time"):
                # The first batch of 8 takes 1.6 s.
                list(hasty.score(long_sequences(100)))
        with TeacherClient(address) as patient:
            started = time.monotonic()
            list(patient.score(long_sequences(1)))
            assert time.monotonic() - started < 5


def test_a_deadline_between_answers_only_repeats_what_is_missing() -> None:
    options = TeacherOptions(model="300", engine="mock", port=0, mock_seconds=0.01)
    sequences = long_sequences(150)
    with running_teacher(options) as address, TeacherClient(address, timeout_seconds=0.6) as client:
        answered = Counter(labels.id for labels in client.score(sequences))
    assert answered == Counter(sequence.id for sequence in sequences)


def test_requests_are_interleaved() -> None:
    options = TeacherOptions(model="300", engine="mock", port=0, mock_seconds=0.02)
    with running_teacher(options) as address, TeacherClient(address) as large, TeacherClient(address) as small:
        small.describe()
        stream = large.score(long_sequences(400))
        next(stream)
        started = time.monotonic()
        assert len(list(small.score(long_sequences(8)))) == 8
        # Two batches of 8 x 0.02 s, not the 8 s of the other's request.
        assert time.monotonic() - started < 4
        stream.close()


def test_scores_run_between_the_steps_of_a_decode(model_of: Callable[[str], Path]) -> None:
    options = TeacherOptions(model=str(model_of("llama-untied")), engine="transformers", port=0)
    # One batch.
    prompts = [Prompt(id=str(index), token_ids=[index + 5, 9]) for index in range(8)]
    with running_teacher(options) as address, TeacherClient(address) as decoder, TeacherClient(address) as scorer:
        scorer.describe()
        order: list[str] = []
        decoding = threading.Thread(
            target=lambda: order.extend(
                f"decoded {each.id}"
                for each in decoder.generate(prompts, DecodeOptions(max_new_tokens=240, stop_token_ids=(2,)))
            )
        )
        decoding.start()
        scored = 0
        while decoding.is_alive() and not order:
            scored += len(list(scorer.score(long_sequences(2))))
        decoding.join()
    # Few of these can have come before the decode began; the others ran within its 240 steps.
    assert scored >= 20
    assert len(order) == 8


def test_a_slow_reader_bounds_what_is_computed_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from teacher_server import mock_engine

    computed = []
    original = mock_engine.MockModel.score
    monkeypatch.setattr(
        mock_engine.MockModel, "score", lambda self, work: computed.extend(work) or original(self, work)
    )
    positions = list(range(1, 400))
    sequences = [
        TokenSequence(id=str(index), token_ids=[index % 300, index // 300] * 200, label_positions=positions)
        for index in range(500)
    ]
    # The request takes 2.4 MB of it, labels of one sequence 0.1 MB.
    options = TeacherOptions(model="300", engine="mock", port=0, limits=Limits(held_bytes_per_client=4_000_000))
    with (
        running_teacher(options) as address,
        TeacherClient(address) as reader,
        TeacherClient(address) as other,
    ):
        stream = reader.score(sequences)
        next(stream)
        # After each of these it would be the reader's turn again, for 8 sequences at a time.
        for _ in range(100):
            list(other.score(long_sequences(1)))
        # 51 KB each as sent: gRPC's windows hold some dozens, then the writer waits.
        assert len(computed) < 350
        stream.close()
    # That a client leaves while it is being written to is nothing to worry about.
    assert [record.message for record in caplog.records if record.name.startswith("teacher_server")] == []


def test_garbage_on_the_port_leaves_the_server_alive(mock_address: str, mock_teacher: TeacherClient) -> None:
    host, port = mock_address.split(":")
    random = np.random.default_rng(0)
    greetings = [b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00" * 4096]
    for greeting in greetings:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(greeting + random.bytes(20_000))
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
    with grpc.insecure_channel(mock_address) as channel:
        raw = channel.unary_unary("/teacher.v1.TeacherService/GetTeacher")
        with pytest.raises(grpc.RpcError):
            raw(b"\xff\xff\xff\xff garbage", timeout=10)
    assert len(list(mock_teacher.score(long_sequences(2)))) == 2
