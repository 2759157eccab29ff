"""A tiny student and a tiny teacher of other weights and width, records short enough for both, a run to vary."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.contract.settings import Settings
from services.contract.spec import RunSpec
from services.contract.spec_reading import parse_run
from services.models.tiny import make_tiny_model
from teacher_server.server import TeacherOptions
from tests.teacher.models import make_model
from tests.teacher.serving import running_teacher
from tests.trainer.runs import sharp_model

RECORDS = [
    {
        "instruction": f"Name {count} {thing}.",
        "context": "The harbour had been repaired." if count % 2 else "",
        "response": ", ".join([f"{thing} of Ostrel"] * (1 + count % 4)),
        "category": "brainstorming",
    }
    for count, thing in enumerate(["ports", "colours", "ferries", "seas", "masters"] * 2)
]


@pytest.fixture(scope="session")
def student_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head rows beyond the tokenizer's ids, as large models have."""
    return make_tiny_model(tmp_path_factory.mktemp("student"), seed=1, padded_rows=5)


@pytest.fixture(scope="session")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits large enough to be worth learning; wider than the student, its head padded otherwise."""
    return sharp_model(tmp_path_factory.mktemp("teacher"), seed=2, hidden_size=48, padded_rows=11, factor=15)


@pytest.fixture(scope="session")
def teacher_address(teacher_model: Path) -> Iterator[str]:
    options = TeacherOptions(model=str(teacher_model), engine="transformers", port=0, label_dtype="float32")
    with running_teacher(options) as address:
        yield address


@pytest.fixture(scope="session")
def mock_address(student_model: Path) -> Iterator[str]:
    with running_teacher(TeacherOptions(model=str(student_model), engine="mock", port=0)) as address:
        yield address


@pytest.fixture(scope="session")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def family(student_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of a family."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp(name), tokenizer_from=student_model)
        return made[name]

    return get


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """No teacher answers at its address."""
    return Settings(data_dir=tmp_path / "data", teacher_address="127.0.0.1:9", offline=True)


@pytest.fixture
def kd_settings(settings: Settings, teacher_address: str) -> Settings:
    return settings.model_copy(update={"teacher_address": teacher_address})


@pytest.fixture
def make_run(student_model: Path, teacher_model: Path, records_file: Path) -> Callable[..., RunSpec]:
    """A run of ten records in batches of four, two epochs: six steps. With alpha it has the teacher."""

    def make(*, alpha: float = 0.0, training: dict | None = None, **changes: object) -> RunSpec:
        return parse_run(
            {
                "student": {"model": str(student_model)},
                "teacher": {"model": str(teacher_model)} if alpha else None,
                "dataset": {"path": str(records_file)},
                "alpha": alpha,
                "learning_rate": 1e-2,
                "batch_size": 4,
                "seed": 3,
                "training": {"precision": "fp32", "epochs": 2, "max_length": 256, "lr_scheduler": "constant"}
                | (training or {}),
            }
            | changes
        )

    return make
