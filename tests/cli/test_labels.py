"""``smoothkd labels`` against a real teacher with a real cache."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from services.cli.main import app
from services.contract.settings import Settings
from services.contract.spec_reading import load_runs
from services.models.tiny import make_tiny_model
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher

REPOSITORY = Path(__file__).parents[2]
RECORDS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and its teacher."""
    student, teacher = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("teacher")
    return make_tiny_model(student, seed=1), make_tiny_model(teacher, seed=2)


@pytest.fixture
def sweep(models: tuple[Path, Path], tmp_path: Path) -> Path:
    student, teacher = models
    file = tmp_path / "sweep.yaml"
    content = {
        "name": "labels",
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "dataset": {"path": "demo_instructions", "limit": RECORDS},
        "grid": {"alpha": [0, 0.5, 1.0], "seed": [0, 1]},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def smoothkd(*arguments: str, **environment: str) -> str:
    result = CliRunner().invoke(app, ["labels", *arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def test_labels_are_made_once_shared_and_served_elsewhere(
    sweep: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    options = TeacherOptions(model=str(models[1]), engine="transformers", port=0)
    one, two = ({"SMOOTHKD_LABEL_CACHE_DIR": str(tmp_path / name)} for name in ("one", "two"))
    with running_teacher(options, settings=Settings(label_cache_dir=tmp_path / "one")) as address:
        there = {**one, "SMOOTHKD_TEACHER_ADDRESS": address, "SMOOTHKD_DATA_DIR": str(tmp_path / "data")}
        first = re.search(r"(\d+) sequences, (\d+) tokens, (\d+) from", smoothkd("precompute", str(sweep), **there))
        assert first
        sequences, tokens, hits = map(int, first.groups())
        assert 0 < sequences <= RECORDS
        assert tokens > 10 * sequences
        assert hits == 0
        again = smoothkd("precompute", str(sweep), **there)
        assert f"{sequences} sequences, {tokens} tokens, {sequences} from the teacher's cache" in again
        exported = smoothkd("export", str(sweep), "--out", str(tmp_path / "files"), **there)
        assert f"{sequences} from the teacher's cache" in exported
        assert "0 sequences were there already" in exported
        exported = smoothkd("export", str(sweep), "--out", str(tmp_path / "files"), **there)
        assert f"{sequences} sequences were there already" in exported

    shown = smoothkd("info", **one)
    assert re.search(rf"sequences +{sequences}\n", shown)
    size = re.search(r"size +([0-9.]+) of at most 20,480 MiB", shown)
    assert size
    files = [file.stat() for file in (tmp_path / "one").rglob("*") if not file.name.startswith("index")]
    on_disk = sum(file.st_blocks * 512 for file in files if stat.S_ISREG(file.st_mode))
    assert abs(float(size[1]) - on_disk / 2**20) < 0.06
    assert re.search(r"hits +[1-9]", shown)

    assert f"{sequences} of {sequences} sequences put into" in smoothkd("import", str(tmp_path / "files"), **two)
    assert f"0 of {sequences} sequences put into" in smoothkd("import", str(tmp_path / "files"), **two)
    with running_teacher(options, settings=Settings(label_cache_dir=tmp_path / "two")) as address:
        elsewhere = {**two, "SMOOTHKD_TEACHER_ADDRESS": address, "SMOOTHKD_DATA_DIR": str(tmp_path / "data2")}
        served = smoothkd("precompute", str(sweep), **elsewhere)
        assert f"{sequences} from the teacher's cache" in served

    assert f"deleted the labels of {sequences} sequences" in smoothkd("clear", **two)
    assert re.search(r"sequences +0\n", smoothkd("info", **two))


def test_a_sweep_and_a_run_are_told_apart(sweep: Path, tmp_path: Path) -> None:
    runs = load_runs(sweep)
    assert len(runs) == 6
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(runs[-1].model_dump(mode="json")))
    assert load_runs(file) == [runs[-1]]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["info"], "there is no label cache in", 2),
        (["clear"], "there is no label cache in", 2),
        (["import", "nowhere"], "nowhere holds no label files", 2),
        (["precompute", "nowhere.yaml"], "cannot read nowhere.yaml", 2),
    ],
)
def test_what_is_not_there_is_said_without_loading_torch(
    arguments: list[str], message: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was loaded')")
    result = subprocess.run(
        [sys.executable, "-m", "services.cli.main", "labels", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "SMOOTHKD_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_cache_that_is_turned_off_is_said() -> None:
    from services.contract.errors import InvalidInputError

    with pytest.raises(InvalidInputError, match="turned off"):
        smoothkd("info", SMOOTHKD_LABEL_CACHE_GIB="0")
