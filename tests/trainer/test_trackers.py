"""Curves for other tools: each tracker's own records against what the run reports."""

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.contract.errors import CancelledError, MissingExtraError, TrainingError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from student_trainer import trackers
from student_trainer.run_directory import spec_text
from student_trainer.train import train
from tests.trainer.runs import MakeRun
from tests.trainer.tracker_records import Record, read_mlflow, read_trackio, read_wandb

READ = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}
OUTCOMES = {
    "wandb": ("finished", "failed", "preempted"),
    "mlflow": ("FINISHED", "FAILED", "KILLED"),
    "trackio": ("", "failed", "cancelled"),
}

pytestmark = pytest.mark.filterwarnings("ignore")
"""What trackers warn of is not ours."""


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Read once, when the package is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture(params=["wandb", "mlflow", "trackio"])
def tracker(
    request: pytest.FixtureRequest, trackio_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    name: str = request.param
    module = pytest.importorskip(name)
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TRACKIO_PROJECT", tmp_path.name)
    # Set and taken away again, so that what the run sets goes with the test.
    for variable in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    yield name
    if name == "wandb":
        # Its process reads the environment once.
        module.teardown()


@pytest.fixture
def read(tracker: str, tmp_path: Path) -> Callable[[], list[Record]]:
    return lambda: READ[tracker](tmp_path)


def test_a_tracker_knows_curves_settings_and_the_end(
    tracker: str, read: Callable[[], list[Record]], make_run: MakeRun, kd_settings: Settings, tmp_path: Path
) -> None:
    points: list[MetricPoint] = []
    for seed in (3, 4):
        run = make_run(alpha=0.5, seed=seed, training={"report_to": [tracker]})
        train(run, out=tmp_path / f"run{seed}", settings=kd_settings, on_metrics=points.extend if seed == 3 else len)
    first, second = read()
    expected = {(point.step, point.name): point.value for point in points}
    assert len({step for step, _ in expected}) == 6
    assert {at: first.points[at] for at in expected} == pytest.approx(expected)
    assert first.points != second.points
    assert (first.alpha, first.precision, first.outcome, first.problem) == (0.5, "fp32", OUTCOMES[tracker][0], "")
    assert "KD alpha=0.5 lr=0.01 batch=4 seed=3" in first.name
    assert "KD alpha=0.5 lr=0.01 batch=4 seed=4" in second.name


def test_a_tracker_knows_that_a_run_failed(
    tracker: str, read: Callable[[], list[Record]], make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        train(make_run(learning_rate=1e30, training={"report_to": [tracker]}), out=tmp_path / "run", settings=settings)
    (record,) = read()
    assert record.outcome == OUTCOMES[tracker][1]
    assert "the loss is not finite at step 2" in record.problem


def test_a_resumed_run_goes_on_in_the_same_record(
    tracker: str, read: Callable[[], list[Record]], make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    run = make_run(training={"report_to": [tracker]})
    points: list[MetricPoint] = []
    with pytest.raises(CancelledError):
        train(
            run,
            out=tmp_path / "run",
            settings=settings,
            on_metrics=points.extend,
            should_stop=lambda: any(point.step == 2 for point in points),
        )
    (record,) = read()
    assert (record.outcome, max(step for step, _ in record.points)) == (OUTCOMES[tracker][2], 2)
    train(run, out=tmp_path / "run", settings=settings, on_metrics=points.extend)
    (record,) = read()
    expected = {(point.step, point.name): point.value for point in points}
    assert {step for step, _ in expected} == {1, 2, 3, 4, 5, 6}
    assert {at: record.points[at] for at in expected} == pytest.approx(expected)
    if tracker != "trackio":
        assert record.outcome == OUTCOMES[tracker][0]


def test_a_tracker_that_cannot_begin_is_told_before_training(
    make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    points: list[MetricPoint] = []
    run = make_run(training={"report_to": ["mlflow"]})
    with pytest.raises(TrainingError, match="mlflow did not begin a run") as caught:
        train(run, out=tmp_path / "run", settings=settings, on_metrics=points.extend)
    assert "MLFLOW_TRACKING_URI" in caught.value.fix
    assert not points


@pytest.mark.parametrize("tracker", ["mlflow"], indirect=True)
def test_an_experiment_that_was_deleted_is_told(
    tracker: str, make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    client.delete_experiment(client.create_experiment("smoothkd"))
    with pytest.raises(TrainingError, match="smoothkd has been deleted; restore it, or set MLFLOW_EXPERIMENT_NAME"):
        train(make_run(training={"report_to": [tracker]}), out=tmp_path / "run", settings=settings)


@pytest.mark.parametrize("tracker", ["mlflow"], indirect=True)
def test_a_server_that_takes_nothing_does_not_hold_the_end(
    tracker: str,
    read: Callable[[], list[Record]],
    make_run: MakeRun,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow import MlflowClient

    class Endless:
        def wait(self) -> None:
            threading.Event().wait()

    plain = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run_id: str, **what: Any) -> Any:
        return Endless() if "metrics" in what else plain(self, run_id, **what)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr(trackers, "FLUSH_SECONDS", 0.2)
    out = train(make_run(training={"report_to": [tracker]}), out=tmp_path / "run", settings=settings)
    assert (out / "model.safetensors").exists()
    assert "TimeoutError: its server has not taken the last points within 0.2 s" in caplog.text
    (record,) = read()
    assert record.outcome == "FINISHED"


def test_a_tracker_that_breaks_does_not_stop_the_run(
    make_run: MakeRun,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            self.logged = 0

        def log(self, *_: object) -> None:
            self.logged += 1
            if self.logged == 3:
                raise OSError("the disk is full")

    monkeypatch.setitem(trackers._TRACKERS, "mlflow", Broken)
    monkeypatch.setattr(importlib.util, "find_spec", _found(mlflow=importlib.util.find_spec("json")))
    out = train(make_run(training={"report_to": ["mlflow"]}), out=tmp_path / "run", settings=settings)
    assert (out / "model.safetensors").exists()
    warned = [record.message for record in caplog.records if "nothing more" in record.message]
    assert warned == ["mlflow gets nothing more of this run: OSError: the disk is full"]


@pytest.mark.slow
def test_several_processes_report_once_and_answer_once(
    make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(spec_text(make_run(training={"report_to": ["mlflow"], "processes": 2})), encoding="utf-8")
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "SMOOTHKD_OFFLINE": "1",
        "SMOOTHKD_DATA_DIR": str(settings.data_dir),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "services.cli.main", "train", str(file), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'model'}\n"
    (record,) = read_mlflow(tmp_path)
    assert record.outcome == "FINISHED"
    assert sorted(step for step, name in record.points if name == "loss") == [1, 2, 3, 4, 5, 6]


def test_tensorboard_shows_the_same_curves_after_the_run(
    make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Set and taken away again, so that what the run sets goes with the test.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    points: list[MetricPoint] = []
    train(
        make_run(training={"report_to": ["tensorboard"]}),
        out=tmp_path / "run",
        settings=settings,
        on_metrics=points.extend,
    )
    expected = {point.step: point.value for point in points if point.name == "hard_loss"}
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    found = {event.step: event.value for event in read.Scalars("train/hard_loss")}
    assert found == pytest.approx(expected)
    assert len(found) == 6


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)], ids=["nothing", "a folder of its runs"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_trains(
    found: ModuleSpec | None, make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", _found(wandb=found))
    with pytest.raises(MissingExtraError, match="report_to names wandb") as caught:
        train(make_run(training={"report_to": ["wandb"]}), out=tmp_path / "run", settings=settings)
    assert "pip install wandb" in caught.value.fix


def _found(**specs: ModuleSpec | None) -> Callable[..., ModuleSpec | None]:
    """Python's search for a module, with other answers for some."""
    search = importlib.util.find_spec
    return lambda name, *rest: specs[name] if name in specs else search(name, *rest)
