"""How a teacher is operated: metrics, logs, traces, and how it stops."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from services.contract.errors import PortInUseError, SmoothKDError
from services.contract.sequences import LabelOptions
from services.contract.settings import Settings
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from services.models.tiny import make_tiny_model
from student_trainer.teacher_client import TeacherClient
from teacher_server.engine import ENGINE_FAILED
from teacher_server.server import TeacherOptions
from tests.teacher.serving import (
    REPOSITORY,
    free_port,
    health_of,
    long_sequences,
    running_teacher,
    teacher_process,
    wait_until,
)


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name.removeprefix("smoothkd_teacher_"), tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }


def test_metrics_count_what_was_asked(tmp_path: Path) -> None:
    port = free_port()
    settings = Settings(label_cache_dir=tmp_path / "labels", label_cache_gib=0.01, teacher_metrics_port=port)
    with (
        running_teacher(TeacherOptions(model="300", engine="mock", port=0), settings=settings) as address,
        TeacherClient(address) as client,
    ):
        assert sum(1 for _ in client.score(long_sequences(6))) == 6
        again = list(client.score(long_sequences(8)))
        list(client.score(long_sequences(2), LabelOptions(encoding="top_k", k=3)))
        with pytest.raises(SmoothKDError):
            list(client.score(long_sequences(1), LabelOptions(encoding="top_k", k=5000)))
        assert len(again) == 8
        wait_until(lambda: scrape(port)[("calls_under_way", (("rpc", "ScoreSequences"),))] == 0)
        found = scrape(port)
    score = ("rpc", "ScoreSequences")
    assert found["calls_total", (score, ("status", "OK"))] == 3
    assert found["calls_total", (score, ("status", "INVALID_ARGUMENT"))] == 1
    assert found["calls_total", (("rpc", "GetTeacher"), ("status", "OK"))] == 1
    assert found["call_seconds_count", (score,)] == 4
    exact = ("encoding", "exact")
    assert found["sequences_total", (exact, ("source", "computed"))] == 8
    assert found["sequences_total", (exact, ("source", "cache"))] == 6
    # Two positions of each sequence.
    assert found["label_tokens_total", (exact, ("source", "computed"))] == 16
    assert found["label_tokens_total", (("encoding", "top_k"), ("source", "computed"))] == 4
    assert found["batch_sequences_sum", ()] == 10
    assert found["batch_tokens_sum", ()] == 200
    assert found["cache_hits_total", ()] == 6
    assert found["cache_misses_total", ()] == 10
    assert found["cache_entries", ()] == 10
    assert found["cache_bytes", ()] > 0
    for name in ("queue_sequences", "queue_tokens", "label_bytes", "clients"):
        assert found[name, ()] == 0
    exposed = {re.sub("_(bucket|count|sum)$", "", name) for name, _ in found if not name.endswith("_created")}
    table = (REPOSITORY / "docs" / "operations.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall("`([a-z_]+)`", row)} == exposed
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_metrics_show_what_is_under_way() -> None:
    port = free_port()
    options = TeacherOptions(model="300", engine="mock", port=0, mock_seconds=0.05, metrics_port=port)
    with running_teacher(options) as address, TeacherClient(address) as client:
        stream = client.score(long_sequences(200))
        next(stream)
        found = scrape(port)
        assert found["clients", ()] == 1
        assert found["calls_under_way", (("rpc", "ScoreSequences"),)] == 1
        assert 100 < found["queue_sequences", ()] < 200
        assert found["queue_tokens", ()] == 20 * found["queue_sequences", ()]
        assert found["label_bytes", ()] > 0
        stream.close()
        wait_until(lambda: scrape(port)["queue_sequences", ()] == 0)
        wait_until(lambda: ("calls_total", (("rpc", "ScoreSequences"), ("status", "CANCELLED"))) in scrape(port))


def test_refused_calls_are_counted() -> None:
    port = free_port()
    settings = Settings(teacher_token="t", teacher_metrics_port=port, label_cache_gib=0)
    with running_teacher(TeacherOptions(model="300", engine="mock", port=0), settings=settings) as address:
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            TeacherServiceStub(channel).GetTeacher(pb.GetTeacherRequest())
        key = ("calls_total", (("rpc", "GetTeacher"), ("status", "UNAUTHENTICATED")))
        wait_until(lambda: scrape(port).get(key) == 1)


def test_a_taken_metrics_port_is_refused(mock_address: str) -> None:
    taken = int(mock_address.rpartition(":")[2])
    options = TeacherOptions(model="300", engine="mock", port=0, metrics_port=taken)
    with pytest.raises(PortInUseError, match="listens"), running_teacher(options):
        pass


@pytest.fixture(scope="module")
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


def test_one_trace_runs_from_the_student_through_the_teacher(spans: InMemorySpanExporter, tmp_path: Path) -> None:
    settings = Settings(label_cache_dir=tmp_path / "labels", label_cache_gib=0.01)
    with (
        running_teacher(TeacherOptions(model="300", engine="mock", port=0), settings=settings) as address,
        TeacherClient(address) as client,
    ):
        list(client.score(long_sequences(2)))
        spans.clear()
        with trace.get_tracer("test").start_as_current_span("step") as step:
            list(client.score(long_sequences(5), LabelOptions()))
        wait_until(lambda: len(spans.get_finished_spans()) == 3)
    by_kind = {span.kind.name: span for span in spans.get_finished_spans()}
    server, student = by_kind["SERVER"], by_kind["CLIENT"]
    assert {span.context.trace_id for span in by_kind.values()} == {step.get_span_context().trace_id}
    assert student.parent is not None
    assert student.parent.span_id == step.get_span_context().span_id
    assert server.parent is not None
    assert server.parent.span_id == student.context.span_id
    assert server.parent.is_remote
    assert server.name == student.name == "teacher.v1.TeacherService/ScoreSequences"
    attributes = dict(server.attributes or {})
    assert attributes["smoothkd.sequences"] == 5
    assert attributes["smoothkd.tokens"] == 100
    assert attributes["smoothkd.label_tokens"] == 10
    assert attributes["smoothkd.cache_hits"] == 2
    assert attributes["smoothkd.encoding"] == "exact"
    assert attributes["rpc.grpc.status_code"] == 0


def test_failed_calls_are_failed_spans(spans: InMemorySpanExporter, mock_teacher: TeacherClient) -> None:
    mock_teacher.describe()
    wait_until(lambda: any("GetTeacher" in span.name for span in spans.get_finished_spans()))
    spans.clear()
    with pytest.raises(SmoothKDError):
        list(mock_teacher.score(long_sequences(1), LabelOptions(encoding="top_k", k=5000)))
    wait_until(lambda: len(spans.get_finished_spans()) == 2)
    for span in spans.get_finished_spans():
        assert span.status.status_code is trace.StatusCode.ERROR
        assert dict(span.attributes or {})["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def teacher_command(*arguments: str, log: Path, **settings: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SMOOTHKD_LABEL_CACHE_GIB": "0", **settings}
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "teacher", "--model", "300", "--engine", "mock", *arguments],
            cwd=REPOSITORY,
            stderr=sink,
            env=environment,
        )


def test_logs_are_json_where_asked(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    model = make_tiny_model(tmp_path / "model")
    arguments = ("--engine", "transformers", "--model", str(model))
    process = teacher_command(*arguments, log=log, SMOOTHKD_LOG_FORMAT="json", SMOOTHKD_TEACHER_PORT=str(port))
    try:
        with TeacherClient(f"127.0.0.1:{port}", patience_seconds=60) as client, pytest.raises(SmoothKDError):
            list(client.score(long_sequences(1), LabelOptions(encoding="top_k", k=5000)))
    finally:
        process.terminate()
        assert process.wait(30) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    (refused,) = [line for line in lines if "INVALID_ARGUMENT" in line["message"]]
    assert refused["rpc"] == "ScoreSequences"
    assert re.fullmatch("[0-9a-f]{12}", refused["request"])
    assert lines[-1]["message"] == "stopped"


def test_draining_says_so_refuses_and_finishes(tmp_path: Path) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    options = {"model": "300", "engine": "mock", "port": port, "mock_seconds": 0.05, "drain_seconds": 30.0}
    with (
        teacher_process(options, log=tmp_path / "log") as process,
        TeacherClient(address, patience_seconds=60) as client,
        TeacherClient(address, patience_seconds=0) as late,
    ):
        client.describe()
        assert late.describe().model == "300"
        stream = client.score(long_sequences(60))
        next(stream)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: health_of(address) != "SERVING")
        with pytest.raises(SmoothKDError):
            list(late.score(long_sequences(1)))
        assert process.poll() is None
        assert len(list(stream)) == 59
        assert process.wait(15) == 0


def test_draining_waits_for_nobody_who_only_watches(tmp_path: Path) -> None:
    port = free_port()
    options = {"model": "300", "engine": "mock", "port": port, "drain_seconds": 300.0}
    states: list[int] = []
    with (
        teacher_process(options, log=tmp_path / "log") as process,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        wait_until(lambda: health_of(f"127.0.0.1:{port}") == "SERVING")
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        states.append(next(watch).status)
        process.send_signal(signal.SIGTERM)
        # It ends in OK: the server said all that there is to say.
        states.extend(answer.status for answer in watch)
        assert process.wait(15) == 0
    assert states[0] == health_pb2.HealthCheckResponse.SERVING
    assert set(states[1:]) == {health_pb2.HealthCheckResponse.NOT_SERVING}


@pytest.mark.parametrize(("drain_seconds", "signals"), [(0.5, 1), (300.0, 2)])
def test_what_does_not_finish_is_cancelled(drain_seconds: float, signals: int, tmp_path: Path) -> None:
    port = free_port()
    # All of it would take 100 s.
    options = {"model": "300", "engine": "mock", "port": port, "mock_seconds": 0.1, "drain_seconds": drain_seconds}
    with (
        teacher_process(options, log=tmp_path / "log") as process,
        TeacherClient(f"127.0.0.1:{port}", patience_seconds=30) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        client.describe()
        stream = client.score(long_sequences(1000))
        next(stream)
        began = time.monotonic()
        reading = thread.submit(list, stream)
        for count in range(signals):
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: (tmp_path / "log").read_text().count("stopping;") == 1)
            assert count + 1 == signals or process.poll() is None
        assert process.wait(20) == 0
        assert time.monotonic() - began < 25
        client.close()
        with pytest.raises(SmoothKDError):
            reading.result(10)


def test_an_engine_that_fails_for_good_ends_the_process_in_an_error(tmp_path: Path) -> None:
    port = free_port()
    options = {"model": "300", "engine": "mock", "port": port}
    with (
        teacher_process(options, log=tmp_path / "log") as process,
        TeacherClient(f"127.0.0.1:{port}", patience_seconds=60) as client,
    ):
        client.describe()
        process.send_signal(ENGINE_FAILED)
        assert process.wait(20) != 0
    assert "TeacherError: the teacher's engine has failed" in (tmp_path / "log").read_text()
