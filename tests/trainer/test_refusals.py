"""What a run refuses, and that it leaves nothing half done."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.contract.errors import (
    CancelledError,
    DatasetError,
    HandshakeError,
    LabelMismatchError,
    ModelNotFoundError,
    TeacherUnavailableError,
    TrainingError,
    UnsupportedError,
)
from services.contract.settings import Settings
from services.contract.soft_labels import ExactLabels
from services.models.tiny import make_tiny_model
from student_trainer import teacher
from student_trainer.teacher_client import TeacherClient
from student_trainer.train import train
from tests.trainer.runs import MakeRun, stop_after


def test_an_unreachable_teacher_is_an_error_before_training(
    make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        teacher, "TeacherClient", lambda address, **options: TeacherClient(address, patience_seconds=0.3, **options)
    )
    with pytest.raises(TeacherUnavailableError, match=r"127\.0\.0\.1:9"):
        train(make_run(alpha=1.0), out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_before_training(make_run: MakeRun, kd_settings: Settings, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", vocab_size=290)
    with pytest.raises(HandshakeError, match="token ids"):
        train(make_run(alpha=1.0, student={"model": str(other)}), out=tmp_path / "run", settings=kd_settings)
    assert not (tmp_path / "run").exists()


def test_misaligned_labels_are_refused_before_training(
    make_run: MakeRun, kd_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every hash is right, but the hidden states are those of the next position."""
    plain = TeacherClient.score

    def misaligned(self: TeacherClient, sequences, options):
        for scored in plain(self, sequences, options):
            yield replace(scored, labels=ExactLabels(hidden_ND=np.roll(scored.labels.hidden_ND, 1, axis=0)))

    monkeypatch.setattr(TeacherClient, "score", misaligned)
    with pytest.raises(LabelMismatchError, match="log-probability that differs"):
        train(make_run(alpha=1.0), out=tmp_path / "run", settings=kd_settings)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_refused(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        train(make_run(student={"model": str(tmp_path / "no")}), out=tmp_path / "run", settings=settings)


def test_a_bad_row_is_refused_before_training(
    make_run: MakeRun, settings: Settings, records_file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(records_file.read_text() + '{"instruction": "Name a port.", "response": ""}\n')
    with pytest.raises(DatasetError, match="line 11: column 'response' is empty"):
        train(make_run(dataset={"path": str(bad)}), out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_fp16_without_a_gpu_is_refused(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(UnsupportedError, match="needs a GPU"):
        train(make_run(training={"precision": "fp16"}), out=tmp_path / "run", settings=settings)


def test_a_loss_that_is_not_finite_names_step_and_records(
    make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    spec = make_run(learning_rate=1e30, batch_size=5, training={"checkpoint_steps": 1, "epochs": 3})
    with pytest.raises(TrainingError, match=r"the loss is not finite at step [23], records \["):
        train(spec, out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "model").exists()


def test_a_gradient_that_is_not_finite_is_an_error(
    make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    """Weights near the end of float32's range: the loss can still be told, its gradient cannot."""
    directory = tmp_path / "model"
    shutil.copytree(student_model, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e-30
    tensors["lm_head.weight"] *= 1e30
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="is not finite at step 1"):
        train(make_run(student={"model": str(directory)}), out=tmp_path / "run", settings=settings)


def test_another_run_directory_is_refused_and_what_is_evaluated_may_change(
    make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(CancelledError):
        train(make_run(), out=tmp_path / "run", settings=settings, should_stop=stop_after(8))
    with pytest.raises(TrainingError, match="holds another run"):
        train(make_run(seed=4), out=tmp_path / "run", settings=settings)
    evaluated = make_run(evaluation={"benchmarks": ["demo_news"]})
    assert train(evaluated, out=tmp_path / "run", settings=settings).is_dir()


def test_a_refused_model_is_not_published(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    def refuse() -> None:
        raise TrainingError("somebody else has the run")

    with pytest.raises(TrainingError, match="somebody else"):
        train(make_run(), out=tmp_path / "run", settings=settings, before_rename=refuse)
    assert not (tmp_path / "run" / "model").exists()
    assert train(make_run(), out=tmp_path / "run", settings=settings).is_dir()
