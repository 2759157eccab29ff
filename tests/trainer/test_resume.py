"""Interrupted runs end with the same bits."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from services.contract.errors import (
    CancelledError,
)
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from student_trainer.train import train
from tests.trainer.runs import MakeRun, assert_same_bits, stop_after


@pytest.fixture
def dropout_model(student_model: Path, tmp_path: Path) -> Path:
    """Draws random numbers in every layer of every forward pass."""
    directory = tmp_path / "dropout"
    shutil.copytree(student_model, directory)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.2'))
    assert '"attention_dropout": 0.2' in config.read_text()
    return directory


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("stops", [(2,), (3,), (5, 2), (9,), (10,), (12, 4)])
def test_an_interrupted_run_ends_with_the_same_bits(
    alpha: float,
    stops: tuple[int, ...],
    make_run: MakeRun,
    settings: Settings,
    mock_address: str,
    student_model: Path,
    dropout_model: Path,
    tmp_path: Path,
) -> None:
    """Stopped within the first step, between steps, within others, at an epoch's end, right behind it, and twice.

    The mock teacher's labels are the same bits whatever else it is asked at the time.
    """
    settings = settings.model_copy(update={"teacher_address": mock_address})
    spec = make_run(
        alpha=alpha,
        student={"model": str(dropout_model)},
        teacher={"model": str(student_model)},
        training={"lr_scheduler": "cosine"},
    )
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    for stop in stops:
        with pytest.raises(CancelledError, match="stopped at step"):
            train(spec, out=tmp_path / "broken", settings=settings, should_stop=stop_after(stop))
        assert not (tmp_path / "broken" / "model").exists()
    steps: list[MetricPoint] = []
    resumed = train(spec, out=tmp_path / "broken", settings=settings, on_metrics=steps.extend)
    assert_same_bits(resumed, straight)
    if stops[0] >= 3:
        assert min(point.step for point in steps) > 1, "it started anew instead of going on"


def test_a_checkpoint_cut_short_is_left_aside(
    make_run: MakeRun, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_run(training={"checkpoint_steps": 1})
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    with pytest.raises(CancelledError):
        train(spec, out=tmp_path / "broken", settings=settings, should_stop=stop_after(12))
    checkpoints = sorted((tmp_path / "broken" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    (checkpoints[-1] / "whole.json").unlink()
    (checkpoints[-1] / "model.safetensors").write_bytes(b"cut short")
    resumed = train(spec, out=tmp_path / "broken", settings=settings)
    assert f"{checkpoints[-1]} was not saved whole" in caplog.text
    assert_same_bits(resumed, straight)


def test_sigterm_saves_a_checkpoint(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    spec = make_run()
    before = signal.getsignal(signal.SIGTERM)

    def terminate(points: list[MetricPoint]) -> None:
        if points[0].step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(CancelledError, match="stopped at step"):
        train(spec, out=tmp_path / "run", settings=settings, on_metrics=terminate)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / "whole.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("labels")]
