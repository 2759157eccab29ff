"""Curves for other tools: TensorBoard's own reader against what the run reports."""

import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.contract.errors import MissingExtraError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from student_trainer.train import train
from tests.trainer.runs import MakeRun


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


def test_a_tracker_that_is_not_installed_is_told_before_anything_trains(
    make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    assert importlib.util.find_spec("wandb") is None, "the test needs one that is not there"
    with pytest.raises(MissingExtraError, match="report_to names wandb") as caught:
        train(make_run(training={"report_to": ["wandb"]}), out=tmp_path / "run", settings=settings)
    assert "pip install wandb" in caught.value.fix
