"""A run's curves in Weights & Biases, MLflow or Trackio: ``training.report_to``.

The trackers know the run by the same names, steps and settings as the store does. Where they keep their records, and
who may, their own environment variables say (``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_SPACE_ID`` ...).
"""

import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from filelock import FileLock

from services.contract.errors import CancelledError, TrainingError
from services.contract.records import MetricPoint
from services.contract.spec import RunSpec
from student_trainer.arguments import processes
from student_trainer.run_directory import write_whole

log = logging.getLogger(__name__)

PROJECT = "smoothkd"
"""Where runs are collected unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT says otherwise."""

ID_FILE = "tracked-as"
"""Inside a run's directory: what its trackers know it by, so that a resumed run goes on in the same record."""

FLUSH_SECONDS = 60
"""How long the end of a run waits for MLflow's server to take its last points; the model is there by then."""

Outcome = Literal["succeeded", "failed", "cancelled"]


class Trackers:
    """Where a run reports to, but TensorBoard; as a context it begins a run there, and ends it with how it came out.

    Of several processes the first reports. A tracker that cannot begin is a TrainingError; one that breaks later is
    left with a warning, for the run's results do not depend on it. ``offline`` keeps what would go out on this machine
    where the tracker can.
    """

    def __init__(self, spec: RunSpec, *, directory: Path, offline: bool) -> None:
        reports = processes().is_main_process
        self._names = [name for name in spec.training.report_to if reports and name in _TRACKERS]
        self._spec = spec
        self._directory = directory
        self._offline = offline
        self._begun: dict[str, _Tracker] = {}

    def __enter__(self) -> "Trackers":
        for name in self._names:
            try:
                # What they print is not for whoever reads the path of the model.
                with redirect_stdout(sys.stderr):
                    self._begun[name] = _TRACKERS[name](self._spec, self._run_id(), self._offline)
            except Exception as error:
                self._end("failed", f"{name} did not begin")
                raise TrainingError(
                    f"training.report_to: {name} did not begin a run: {type(error).__name__}: {error}",
                    fix=f"{_FIXES[name]}, or leave it out; the dashboard shows the same curves.",
                ) from error
        return self

    def add(self, points: Sequence[MetricPoint]) -> None:
        """Points of one step."""
        if points:
            values = {point.name: point.value for point in points}
            self._each(lambda tracker: tracker.log(values, points[0].step))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped = isinstance(error, CancelledError | KeyboardInterrupt)
        outcome: Outcome = "succeeded" if error is None else "cancelled" if stopped else "failed"
        self._end(outcome, str(error or ""))

    def _end(self, outcome: Outcome, why: str) -> None:
        self._each(lambda tracker: tracker.end(outcome, why))
        self._begun.clear()

    def _each(self, act: "Callable[[_Tracker], None]") -> None:
        for name, tracker in list(self._begun.items()):
            try:
                with redirect_stdout(sys.stderr):
                    act(tracker)
            except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on without it
                log.warning("%s gets nothing more of this run: %s: %s", name, type(error).__name__, error)
                del self._begun[name]

    def _run_id(self) -> str:
        path = self._directory / ID_FILE
        if not path.exists():
            write_whole(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8").strip()


def run_title(spec: RunSpec) -> str:
    """What tells a run from the others of its sweep, and a teacher's fine-tuning from both."""
    student = Path(spec.student.model).name
    return f"{student} {spec.method} lr={spec.learning_rate:g} batch={spec.batch_size} seed={spec.seed}"


class _Tracker(Protocol):
    """One tracker's record of one run, begun."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def end(self, outcome: Outcome, why: str) -> None: ...


class _Wandb:
    def __init__(self, spec: RunSpec, run_id: str, offline: bool) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            name=run_title(spec),
            group=os.environ.get("WANDB_RUN_GROUP", spec.method),
            config=_settings_of(spec),
            resume="allow",
            mode="offline" if offline and "WANDB_MODE" not in os.environ else None,
        )
        # Its own count of steps only rises, and a run that goes on from a checkpoint repeats some.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def end(self, outcome: Outcome, why: str) -> None:
        if why or self._run.summary.get("problem"):
            self._run.summary["problem"] = why
        if outcome == "cancelled":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "succeeded" else 1)


class _Mlflow:
    def __init__(self, spec: RunSpec, run_id: str, offline: bool) -> None:
        # It would report to its makers how it is used.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A server that is not there is told after seconds instead of minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric, self._under_way = Metric, list[Any]()
        # Two runs that begin together would both make the tables of a new database, and both fail.
        with FileLock(Path(tempfile.gettempdir()) / f"smoothkd-mlflow-{os.getuid()}.lock", timeout=60):
            self._client = MlflowClient()
            self._run_id = self._begin(spec, run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        # A slow server keeps no step waiting.
        self._under_way.append(self._client.log_batch(self._run_id, metrics=metrics, synchronous=False))

    def end(self, outcome: Outcome, why: str) -> None:
        try:
            if why:
                self._client.set_tag(self._run_id, "problem", why)
            self._flush()
        finally:
            status = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}[outcome]
            self._client.set_terminated(self._run_id, status)

    def _flush(self) -> None:
        """TimeoutError where the server has not taken all points after FLUSH_SECONDS; what it refused is raised."""
        problems: list[Exception] = []

        def wait() -> None:
            try:
                for operation in self._under_way:
                    operation.wait()
            except Exception as error:  # noqa: BLE001 - raised below
                problems.append(error)

        waiting = threading.Thread(target=wait, name="mlflow-flush", daemon=True)
        waiting.start()
        waiting.join(FLUSH_SECONDS)
        if waiting.is_alive():
            raise TimeoutError(f"its server has not taken the last points within {FLUSH_SECONDS} s")
        if problems:
            raise problems[0]

    def _begin(self, spec: RunSpec, run_id: str) -> str:
        """The run's id in MLflow: of the one that goes on, else of a new one."""
        from mlflow.entities import LifecycleStage, Param

        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(project)
        if known and known.lifecycle_stage == LifecycleStage.DELETED:
            raise ValueError(f"its experiment {project} has been deleted; restore it, or set MLFLOW_EXPERIMENT_NAME")
        experiment = known.experiment_id if known else self._client.create_experiment(project)
        tag = "smoothkd.run"
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{run_id}'", max_results=1)
        tags = {tag: run_id, "method": spec.method}
        run = found[0] if found else self._client.create_run(experiment, tags=tags, run_name=run_title(spec))
        begun: str = run.info.run_id
        if found:
            self._client.update_run(begun, status="RUNNING")
        if "problem" in run.data.tags:
            self._client.delete_tag(begun, "problem")
        # What has been noted cannot be noted again.
        missing = [
            Param(name, value) for name, value in _flat(_settings_of(spec)).items() if name not in run.data.params
        ]
        self._client.log_batch(begun, params=missing)
        return begun


class _Trackio:
    def __init__(self, spec: RunSpec, run_id: str, offline: bool) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            # It knows a run by its name alone.
            name=f"{run_title(spec)} {run_id}",
            group=spec.method,
            config=_settings_of(spec),
            resume="allow",
            embed=False,
        )
        self._trackio = trackio

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self, outcome: Outcome, why: str) -> None:
        # It has no states; alerts are how its dashboard tells a run that went wrong.
        if outcome != "succeeded":
            level = self._trackio.AlertLevel.ERROR if outcome == "failed" else self._trackio.AlertLevel.INFO
            self._run.alert(title=outcome, text=why, level=level)
        self._trackio.finish()


_TRACKERS: dict[str, Callable[[RunSpec, str, bool], _Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}

_FIXES = {
    "wandb": "Run wandb login, or set WANDB_MODE=offline",
    "mlflow": "Check MLFLOW_TRACKING_URI",
    "trackio": "Check TRACKIO_SPACE_ID and TRACKIO_SERVER_URL",
}


def _settings_of(spec: RunSpec) -> dict[str, Any]:
    """The whole specification, which holds no secret, with what tables call it."""
    return spec.model_dump(mode="json") | {"method": spec.method, "key": spec.key}


def _flat(settings: Mapping[str, Any], *, under: str = "") -> dict[str, str]:
    """``{"training": {"epochs": 1}}`` as ``{"training.epochs": "1"}``."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, under=f"{under}{name}.")
        else:
            flat[f"{under}{name}"] = str(value)
    return flat
