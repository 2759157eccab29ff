"""What the API refuses before anything runs; the teacher is a real gRPC server."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from services.api.preflight import check_sweep, probe_teacher
from services.contract.errors import (
    DatasetError,
    HandshakeError,
    InvalidInputError,
    LimitExceededError,
    ModelNotFoundError,
    SmoothKDError,
    TeacherUnavailableError,
    UnsupportedError,
)
from services.contract.settings import Settings
from services.contract.spec import SweepSpec
from services.contract.spec_reading import parse_sweep
from services.contract.teacher.v1 import teacher_service_pb2 as wire
from tests.api.teacher import TEACHER, serving


def make_spec(**changes: Any) -> SweepSpec:
    return parse_sweep(
        {
            "name": "check",
            "teacher": {"model": "big-teacher"},
            "student": {"model": "owner/small-student"},
            "dataset": {"path": "demo_instructions"},
            "grid": {"alpha": [0, 1]},
        }
        | changes
    )


def no_teacher(settings: Settings, *, model: str) -> wire.GetTeacherResponse:
    raise AssertionError("the teacher must not be asked")


def refusal(spec: SweepSpec, *, error: type[SmoothKDError], address: str = "") -> SmoothKDError:
    settings = Settings(teacher_address=address, offline=True)
    with pytest.raises(error) as caught:
        check_sweep(spec, settings=settings, probe=probe_teacher if address else no_teacher)
    assert type(caught.value) is error
    assert caught.value.fix
    return caught.value


def test_a_good_sweep_passes() -> None:
    with serving() as address:
        check_sweep(make_spec(), settings=Settings(teacher_address=address, offline=True))


def test_sft_asks_no_teacher() -> None:
    check_sweep(make_spec(grid={"alpha": 0}), settings=Settings(offline=True), probe=no_teacher)


def test_labels_in_files_ask_no_teacher_and_must_be_there(tmp_path: Path) -> None:
    spec = make_spec(distillation={"labels": {"path": str(tmp_path)}})
    check_sweep(spec, settings=Settings(offline=True), probe=no_teacher)
    absent = make_spec(distillation={"labels": {"path": str(tmp_path / "no")}})
    assert "distillation.labels.path" in refusal(absent, error=InvalidInputError).what


def test_a_teacher_that_is_to_be_fine_tuned_must_be_there() -> None:
    spec = make_spec(teacher={"model": "big-teacher", "finetune": {"method": "lora"}})
    with serving() as address:
        check_sweep(spec, settings=Settings(teacher_address=address, offline=True))
    absent = make_spec(teacher={"model": "./no/teacher", "finetune": {"method": "full"}})
    assert "teacher.model: there is no directory" in refusal(absent, error=ModelNotFoundError).what


def test_a_huge_grid_is_refused_before_it_is_expanded() -> None:
    axis = list(range(1, 3001))
    spec = make_spec(grid={"alpha": [0], "seed": axis, "batch_size": axis, "learning_rate": axis})
    assert "27000000000 runs" in refusal(spec, error=LimitExceededError).what


@pytest.mark.parametrize("name", ["./missing", "/no/such/model", "~/no-such-model", "a/b/c"])
def test_a_local_student_must_exist(name: str) -> None:
    assert name in refusal(make_spec(student={"model": name}), error=ModelNotFoundError).what


def test_a_local_student_must_be_a_model(tmp_path: Path) -> None:
    assert "config.json" in refusal(make_spec(student={"model": str(tmp_path)}), error=ModelNotFoundError).what


def test_a_missing_data_set_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "absent.jsonl")
    assert path in refusal(make_spec(dataset={"path": path}), error=DatasetError).what


def test_a_data_set_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Say hello.", "answer": "Hello."}) + "\n")
    assert "'response'" in refusal(make_spec(dataset={"path": str(path)}), error=DatasetError).what


def test_benchmark_files_are_checked(tmp_path: Path) -> None:
    absent, wrong = tmp_path / "absent.jsonl", tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"document": "Text.", "title": "No summary."}) + "\n")
    for name, path, hint in [("arc_easy", absent, "absent.jsonl"), ("xsum", wrong, "'summary'")]:
        spec = make_spec(evaluation={"benchmarks": [{"name": name, "path": str(path)}]})
        assert hint in refusal(spec, error=DatasetError).what


def test_a_benchmark_of_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: str, *, config: str, split: str, offline: bool) -> None:
        raise DatasetError(f"no {path} {config} {split} {offline}", fix="Name a local file.")

    monkeypatch.setattr("services.datasets.reading.check_hub", absent)
    spec = make_spec(evaluation={"benchmarks": ["arc_easy", "cnn_dailymail"]})
    assert refusal(spec, error=DatasetError).what == "no abisee/cnn_dailymail 3.0.0 test True"


def test_no_teacher_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    error = refusal(make_spec(), error=TeacherUnavailableError, address=address)
    assert address in error.what
    assert "smoothkd teacher --model big-teacher" in error.fix


def test_a_silent_teacher_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.api.preflight.PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert address in refusal(make_spec(), error=TeacherUnavailableError, address=address).what


def test_a_teacher_that_is_still_starting() -> None:
    with serving(status=health_pb2.HealthCheckResponse.NOT_SERVING) as address:
        assert "starting" in refusal(make_spec(), error=TeacherUnavailableError, address=address).what


def test_another_teacher_is_named() -> None:
    with serving() as address:
        error = refusal(make_spec(teacher={"model": "other"}), error=HandshakeError, address=address)
    assert "serves big-teacher, not other" in error.what


@pytest.mark.parametrize(
    ("changes", "error", "hint"),
    [
        ({"distillation": {"labels": {"encoding": "full"}}}, UnsupportedError, "exact, top_k"),
        ({"distillation": {"labels": {"encoding": "top_k", "k": 101}}}, LimitExceededError, "k: 100"),
        ({"distillation": {"labels": {"encoding": "sampled", "draws": 51}}}, LimitExceededError, "draws: 50"),
        ({"training": {"max_length": 1025}}, LimitExceededError, "max_length: 1024"),
    ],
)
def test_what_the_teacher_cannot_do_is_refused(changes: dict[str, Any], error: type[SmoothKDError], hint: str) -> None:
    with serving() as address:
        assert hint in refusal(make_spec(**changes), error=error, address=address).fix


def test_sequence_level_needs_a_teacher_that_generates() -> None:
    answer = wire.GetTeacherResponse()
    answer.CopyFrom(TEACHER)
    answer.generates = False
    spec = make_spec(distillation={"level": "sequence"}, grid={"alpha": 0})
    with serving(answer) as address:
        assert "does not generate" in refusal(spec, error=UnsupportedError, address=address).what
    with serving() as address:
        check_sweep(spec, settings=Settings(teacher_address=address, offline=True))


def test_every_teacher_of_several_is_asked_at_its_own_address() -> None:
    teacher = {"model": "big-teacher", "others": [{"model": "other-teacher", "revision": "1"}]}
    spec = make_spec(teacher=teacher)
    assert "other-teacher" in refusal(spec, error=InvalidInputError, address="127.0.0.1:9").fix
    other = wire.GetTeacherResponse()
    other.CopyFrom(TEACHER)
    other.model, other.revision = "other-teacher", "1"
    with serving() as first, serving(other) as second:
        settings = Settings(teacher_address=first, teacher_addresses={"other-teacher": second}, offline=True)
        check_sweep(spec, settings=settings)
        astray = Settings(teacher_address=second, teacher_addresses={"other-teacher": first}, offline=True)
        with pytest.raises(HandshakeError, match=r"serves other-teacher, not big-teacher"):
            check_sweep(spec, settings=astray)
    with serving() as first, serving(TEACHER) as second:
        settings = Settings(teacher_address=first, teacher_addresses={"other-teacher": second}, offline=True)
        with pytest.raises(HandshakeError, match=r"serves big-teacher, not other-teacher"):
            check_sweep(spec, settings=settings)
