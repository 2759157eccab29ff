"""What can be known about a sweep before anything runs, so that no mistake waits for hours behind a training."""

import math
from pathlib import Path
from typing import Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.contract.connection_problems import connection_problem
from services.contract.errors import (
    AuthenticationError,
    DatasetError,
    HandshakeError,
    InvalidInputError,
    LimitExceededError,
    ModelNotFoundError,
    TeacherUnavailableError,
    UnsupportedError,
)
from services.contract.evaluation_spec import QUESTIONS, SUMMARISATION, BenchmarkSpec
from services.contract.settings import Settings
from services.contract.soft_labels import WIRE_ENCODINGS
from services.contract.spec import SweepSpec
from services.contract.teacher.v1 import teacher_service_pb2 as wire
from services.contract.teacher.v1 import teacher_service_pb2_grpc as wire_grpc
from services.contract.teacher_addresses import require_own_addresses
from services.contract.teacher_channel import open_teacher_channel, teacher_access
from services.contract.teacher_spec import OtherTeacherSpec, TeacherSpec
from services.datasets.choices import check_choices
from services.datasets.questions import check_questions
from services.datasets.reading import check_dataset, check_items
from services.models.directory import check_model_directory, is_path

_AnyTeacher = TeacherSpec | OtherTeacherSpec

MAX_RUNS = 10_000
PROBE_SECONDS = 3.0


class TeacherProbe(Protocol):
    """Asks the teacher at the address that the settings have for a model who it is; see ``probe_teacher``."""

    def __call__(self, settings: Settings, *, model: str) -> wire.GetTeacherResponse: ...


def probe_teacher(settings: Settings, *, model: str) -> wire.GetTeacherResponse:
    """What the teacher says of itself, once it is certain to serve ``model``.

    TeacherUnavailableError when nothing answers at its address, or what answers is not ready; AuthenticationError
    when it wants another token; HandshakeError when it serves another model.
    """
    address, access = settings.address_of(model), teacher_access(settings)
    with open_teacher_channel(address, access=access, balanced=False) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
            if health.status != health_pb2.HealthCheckResponse.SERVING:
                raise TeacherUnavailableError(
                    f"the teacher at {address} is still starting, or stopping",
                    fix="Wait until it serves, then send the sweep again.",
                )
            return _ask(wire_grpc.TeacherServiceStub(channel), address=address, model=model)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise _refused(error, address=address) from None
            problem = connection_problem(error.details(), address=address, access=access)
            raise TeacherUnavailableError(
                f"no teacher answers at {address} ({error.code().name}: {error.details()})"
                if problem is None
                else f"the teacher at {address} {problem.what}",
                fix=f"Start it with `smoothkd teacher --model {model}`, or set SMOOTHKD_TEACHER_ADDRESS."
                if problem is None
                else problem.fix,
                details={"address": address},
            ) from None


def check_sweep(spec: SweepSpec, *, settings: Settings, probe: TeacherProbe = probe_teacher) -> None:
    """Raises the first thing that would make the sweep fail, cheapest checks first; stores nothing.

    The size of the grid, local directories of models that are to be trained, the data set and its columns, benchmarks,
    the directory of label files, and every teacher where the sweep needs them.
    """
    _check_size(spec)
    _check_model(spec.student.model, revision=spec.student.revision, field="student.model")
    if spec.teacher is not None and spec.teacher.finetune is not None:
        _check_model(spec.teacher.model, revision=spec.teacher.revision, field="teacher.model")
    check_dataset(spec.dataset, offline=settings.offline)
    for benchmark in spec.evaluation.benchmarks:
        _check_benchmark(benchmark, limit=spec.evaluation.limit, offline=settings.offline)
    decodes, labels = spec.distillation.level != "word", spec.distillation.labels
    if labels.path is not None:
        _check_label_files(Path(labels.path).expanduser())
    if spec.teacher is not None and (decodes or (max(spec.grid.alpha) > 0 and labels.path is None)):
        require_own_addresses(spec.teacher, settings)
        teachers: tuple[_AnyTeacher, ...] = (spec.teacher, *spec.teacher.others)
        for wanted in teachers:
            address = settings.address_of(wanted.model)
            _check_teacher(spec, wanted, probe(settings, model=wanted.model), address=address)


def _check_size(spec: SweepSpec) -> None:
    grid = spec.grid
    runs = math.prod(map(len, (grid.alpha, grid.learning_rate, grid.batch_size, grid.seed)))
    if runs > MAX_RUNS:
        raise LimitExceededError(
            f"grid: {runs} runs are more than the {MAX_RUNS} that one sweep may hold",
            fix="Split the grid over several sweeps.",
        )


def _check_model(model: str, *, revision: str | None, field: str) -> None:
    directory = Path(model).expanduser()
    if directory.is_dir():
        check_model_directory(directory, revision=revision)
    elif is_path(model):
        raise ModelNotFoundError(
            f"{field}: there is no directory {model} (looked from {Path.cwd()})",
            fix="Correct the path, or use a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct.",
        )


def _check_benchmark(benchmark: BenchmarkSpec, *, limit: int | None, offline: bool) -> None:
    if benchmark.path is not None and not Path(benchmark.path).expanduser().is_file():
        raise DatasetError(
            f"evaluation.benchmarks: there is no file {benchmark.path} for {benchmark.name} (looked from {Path.cwd()})",
            fix=f"Correct the path, or leave it out to use {benchmark.name}'s own data.",
        )
    if benchmark.name in SUMMARISATION:
        check_items(benchmark, limit=limit, offline=offline)
    elif benchmark.name in QUESTIONS:
        check_questions(benchmark, limit=limit, offline=offline)
    elif benchmark.path is not None:
        check_choices(benchmark)


def _check_label_files(directory: Path) -> None:
    if not directory.is_dir():
        raise InvalidInputError(
            f"distillation.labels.path: there is no directory {directory} (looked from {Path.cwd()})",
            fix="Correct the path, or write label files there with `smoothkd labels export`.",
        )


def _check_teacher(spec: SweepSpec, wanted: _AnyTeacher, teacher: wire.GetTeacherResponse, *, address: str) -> None:
    if wanted.revision and teacher.revision and wanted.revision != teacher.revision:
        raise HandshakeError(
            f"teacher.revision: the teacher at {address} serves revision {teacher.revision}, not {wanted.revision}",
            fix="Start the teacher with that revision, or name the one it serves.",
        )
    labels = spec.distillation.labels
    if max(spec.grid.alpha) > 0 and WIRE_ENCODINGS[labels.encoding] not in teacher.encodings:
        offered = [name for name, number in WIRE_ENCODINGS.items() if number in teacher.encodings]
        raise UnsupportedError(
            f"distillation.labels.encoding: the teacher at {address} does not offer {labels.encoding}",
            fix=f"Use one of {', '.join(offered)}.",
        )
    if labels.k is not None and labels.k > teacher.max_k:
        raise LimitExceededError(
            f"distillation.labels.k: {labels.k} is more than the {teacher.max_k} that the teacher at {address} gives",
            fix=f"Use k: {teacher.max_k} or less.",
        )
    if labels.draws is not None and labels.draws > teacher.max_draws:
        raise LimitExceededError(
            f"distillation.labels.draws: {labels.draws} is more than the {teacher.max_draws} that the teacher at "
            f"{address} makes",
            fix=f"Use draws: {teacher.max_draws} or less.",
        )
    if spec.training.max_length > teacher.max_length:
        raise LimitExceededError(
            f"training.max_length: {spec.training.max_length} tokens are more than the {teacher.max_length} "
            f"that the teacher at {address} takes",
            fix=f"Use max_length: {teacher.max_length} or less.",
        )
    if wanted is spec.teacher and spec.distillation.level != "word" and not teacher.generates:
        raise UnsupportedError(
            f"distillation.level: the teacher at {address} does not generate, which {spec.distillation.level} needs",
            fix="Start the teacher again with --generation, which vLLM needs to decode, or use level word.",
        )


def _ask(teacher: wire_grpc.TeacherServiceStub, *, address: str, model: str) -> wire.GetTeacherResponse:
    answer: wire.GetTeacherResponse
    try:
        answer = teacher.GetTeacher(wire.GetTeacherRequest(model=model), timeout=PROBE_SECONDS)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise
        # It knows best which names mean its model, and this one does not; ask for a name that does.
        served = teacher.GetTeacher(wire.GetTeacherRequest(), timeout=PROBE_SECONDS).model
        raise HandshakeError(
            f"teacher.model: the teacher at {address} serves {served}, not {model}",
            fix=f"Start one with `smoothkd teacher --model {model}`, or name {served} in the sweep.",
            details={"address": address, "serves": served},
        ) from None
    return answer


def _refused(error: grpc.RpcError, *, address: str) -> AuthenticationError:
    return AuthenticationError(
        f"the teacher at {address} refuses this API: {error.details()}",
        fix="Start the API with the teacher's own SMOOTHKD_TEACHER_TOKEN.",
    )
