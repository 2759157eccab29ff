"""Training from label files: the same weights as against the teacher that made them, and no teacher asked."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.contract.errors import (
    CancelledError,
    DatasetError,
    HandshakeError,
    InvalidInputError,
    LabelMismatchError,
)
from services.contract.sequences import TokenSequence
from services.contract.settings import Settings
from services.contract.soft_labels import ExactLabels
from services.labels.files import LabelFiles, LabelWriter
from services.labels.manifest import MANIFEST
from services.models.tiny import make_tiny_model
from student_trainer.precompute import precompute_labels
from student_trainer.teacher_client import TeacherClient
from student_trainer.train import train
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher
from tests.trainer.conftest import RECORDS
from tests.trainer.runs import MakeRun, assert_same_bits, stop_after

TOP_K = {"labels": {"encoding": "top_k", "k": 4}, "temperature": 2.0}


def in_files(run, directory: Path):
    """The run with its labels from a directory."""
    labels = run.distillation.labels.model_copy(update={"path": str(directory)})
    return run.model_copy(update={"distillation": run.distillation.model_copy(update={"labels": labels})})


@pytest.fixture(scope="module")
def lone_teacher(teacher_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A teacher with a label cache, without which batches of other make-up would change the last bits of labels."""
    cached = Settings(label_cache_dir=tmp_path_factory.mktemp("cache"))
    options = TeacherOptions(model=str(teacher_model), engine="transformers", port=0)
    with running_teacher(options, settings=cached) as address:
        yield address


@pytest.mark.parametrize(
    ("distillation", "source"),
    [
        ({}, "transformers"),
        ({}, "mock"),
        (TOP_K, "transformers"),
        ({"labels": {"encoding": "full"}}, "transformers"),
        ({"labels": {"encoding": "sampled", "draws": 20, "seed": 5}}, "transformers"),
        ({"labels": {"encoding": "projected"}}, "transformers"),
    ],
)
def test_files_train_the_very_weights_that_the_teacher_does(
    distillation: dict,
    source: str,
    make_run: MakeRun,
    settings: Settings,
    lone_teacher: str,
    mock_address: str,
    student_model: Path,
    tmp_path: Path,
) -> None:
    teacher = {"model": str(student_model)} if source == "mock" else None
    changes = {"distillation": distillation} | ({"teacher": teacher} if teacher else {})
    if distillation.get("labels") == {"encoding": "projected"}:
        changes["student"] = {"model": str(student_model), "lora": {"rank": 4}}
    run = make_run(alpha=2.0, **changes)
    address = mock_address if source == "mock" else lone_teacher
    online = settings.model_copy(update={"teacher_address": address})
    done = precompute_labels([run], settings=online, out=tmp_path / "labels")
    assert (done.sequences, done.already) == (len(RECORDS), 0)
    if source == "transformers":
        assert precompute_labels([run], settings=online).hits == len(RECORDS)
    live = train(run, out=tmp_path / "live", settings=online)
    # These settings know no teacher.
    offline = train(in_files(run, tmp_path / "labels"), out=tmp_path / "offline", settings=settings)
    assert_same_bits(offline, live)


def test_an_interrupted_export_goes_on_and_more_records_are_added(
    make_run: MakeRun, settings: Settings, lone_teacher: str, tmp_path: Path
) -> None:
    online = settings.model_copy(update={"teacher_address": lone_teacher})
    run = make_run(alpha=1.0)
    out = tmp_path / "labels"
    with pytest.raises(CancelledError):
        precompute_labels([run], settings=online, out=out, should_stop=stop_after(3))
    assert 1 <= len(LabelFiles(out)) <= 4
    there = len(LabelFiles(out))
    done = precompute_labels([run], settings=online, out=out)
    assert (done.already, done.sequences) == (there, len(RECORDS) - there)
    again = precompute_labels([run], settings=online, out=out)
    assert (again.already, again.sequences, again.tokens) == (len(RECORDS), 0, 0)


def test_a_record_without_labels_is_named_before_training_with_the_way_to_add_it(
    make_run: MakeRun, settings: Settings, lone_teacher: str, tmp_path: Path
) -> None:
    online = settings.model_copy(update={"teacher_address": lone_teacher})
    few = make_run(alpha=1.0)
    few = few.model_copy(update={"dataset": few.dataset.model_copy(update={"limit": 7})})
    out = tmp_path / "labels"
    precompute_labels([few], settings=online, out=out)
    run = in_files(make_run(alpha=1.0), out)
    with pytest.raises(InvalidInputError, match=r"record 7 .* no labels .* 2 of the others") as caught:
        train(run, out=tmp_path / "run", settings=settings)
    assert f"smoothkd labels export RUN.yaml --out {out}" in caught.value.fix
    assert not (tmp_path / "run").exists()
    done = precompute_labels([run], settings=online, out=out)
    assert (done.already, done.sequences) == (7, 3)
    assert train(run, out=tmp_path / "run", settings=settings).is_dir()


@pytest.fixture
def labels(make_run: MakeRun, settings: Settings, lone_teacher: str, tmp_path: Path) -> Path:
    online = settings.model_copy(update={"teacher_address": lone_teacher})
    precompute_labels([make_run(alpha=1.0)], settings=online, out=tmp_path / "labels")
    return tmp_path / "labels"


def test_labels_of_another_kind_or_teacher_or_tokenizer_are_refused(
    make_run: MakeRun, settings: Settings, labels: Path, student_model: Path, tmp_path: Path
) -> None:
    def refused(error: type[Exception], match: str, **changes: object) -> None:
        with pytest.raises(error, match=match):
            train(in_files(make_run(alpha=1.0, **changes), labels), out=tmp_path / "run", settings=settings)
        assert not (tmp_path / "run").exists()

    refused(InvalidInputError, "another kind: exact; the run asks for top_k k=4 temperature=2", distillation=TOP_K)
    refused(HandshakeError, f"not of {student_model}", teacher={"model": str(student_model)})
    other = make_tiny_model(tmp_path / "other", vocab_size=290)
    refused(HandshakeError, "the student has 290 token ids", student={"model": str(other)})
    content = json.loads((labels / MANIFEST).read_text())
    content["probe_texts"] = content["probe_texts"][:-1]
    (labels / MANIFEST).write_text(json.dumps(content))
    refused(HandshakeError, "other texts")


def test_labels_whose_log_probabilities_do_not_fit_are_refused_before_training(
    make_run: MakeRun, settings: Settings, labels: Path, tmp_path: Path
) -> None:
    """Every checksum is right, but the hidden states are those of the next position."""
    files = LabelFiles(labels)
    with LabelWriter(tmp_path / "rolled", files.manifest, head=files.lm_head()) as writer:
        for item in files:
            scored = item.scored
            rolled = ExactLabels(hidden_ND=np.roll(scored.labels.hidden_ND, 1, axis=0))
            sequence = TokenSequence(id="", token_ids=item.token_ids, label_positions=item.label_positions)
            writer.write(sequence, replace(scored, labels=rolled))
    with pytest.raises(LabelMismatchError, match="log-probability that differs"):
        train(in_files(make_run(alpha=1.0), tmp_path / "rolled"), out=tmp_path / "run", settings=settings)


def test_labels_that_do_not_fit_are_not_written(
    make_run: MakeRun, settings: Settings, lone_teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TeacherClient.score

    def misaligned(self: TeacherClient, sequences, options):
        for scored in plain(self, sequences, options):
            yield replace(scored, labels=ExactLabels(hidden_ND=np.roll(scored.labels.hidden_ND, 1, axis=0)))

    monkeypatch.setattr(TeacherClient, "score", misaligned)
    online = settings.model_copy(update={"teacher_address": lone_teacher})
    with pytest.raises(LabelMismatchError, match="log-probability that differs"):
        precompute_labels([make_run(alpha=1.0)], settings=online, out=tmp_path / "labels")
    assert len(LabelFiles(tmp_path / "labels")) == 0


def test_a_damaged_row_stops_the_run_with_its_name(
    make_run: MakeRun, settings: Settings, labels: Path, tmp_path: Path
) -> None:
    path = labels / "labels-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"labels-00000\.parquet is damaged"):
        train(in_files(make_run(alpha=1.0), labels), out=tmp_path / "run", settings=settings)


def test_a_directory_without_labels_is_refused(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no label files"):
        train(in_files(make_run(alpha=1.0), tmp_path / "none"), out=tmp_path / "run", settings=settings)


def test_runs_without_soft_labels_have_none_to_make(make_run: MakeRun, settings: Settings) -> None:
    with pytest.raises(InvalidInputError, match="alpha is 0 in every run"):
        precompute_labels([make_run()], settings=settings)


def test_records_too_long_for_the_teacher_are_left_out_alike(
    make_run: MakeRun, settings: Settings, teacher_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    options = TeacherOptions(model=str(teacher_model), engine="transformers", port=0, max_length=60)
    run = make_run(alpha=1.0)
    with running_teacher(options) as address:
        online = settings.model_copy(update={"teacher_address": address})
        try:
            done = precompute_labels([run], settings=online, out=tmp_path / "labels")
        except DatasetError:
            pytest.fail("some records fit into 60 tokens")
    assert 0 < done.sequences < len(RECORDS)
    assert "left out" in caplog.text
    assert train(in_files(run, tmp_path / "labels"), out=tmp_path / "run", settings=settings).is_dir()


def test_projected_labels_of_another_student_are_refused(
    make_run: MakeRun, settings: Settings, lone_teacher: str, student_model: Path, tmp_path: Path
) -> None:
    online = settings.model_copy(update={"teacher_address": lone_teacher})

    def run_of(student: Path):
        lora = {"model": str(student), "lora": {}}
        return make_run(alpha=1.0, distillation={"labels": {"encoding": "projected"}}, student=lora)

    precompute_labels([run_of(student_model)], settings=online, out=tmp_path / "labels")
    other = make_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(InvalidInputError, match="made for another student"):
        train(in_files(run_of(other), tmp_path / "labels"), out=tmp_path / "run", settings=settings)
