"""Damaged models and judges: what is not a number is told, and never counted as an answer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.contract.errors import EvaluationError
from services.contract.evaluation_spec import BenchmarkSpec, EvaluationSpec
from services.contract.settings import Settings
from services.evaluation.answering import Answer, Request
from services.evaluation.detection import DetectorOptions, detect_file
from services.evaluation.evaluate import evaluate
from services.evaluation.finite import FiniteLogits
from services.evaluation.lookback.features import load_lens_model, measure_summaries
from services.evaluation.lookback.measure import Prompt
from services.evaluation.metrics import Metrics
from services.evaluation.verdict import Verdict
from tests.evaluation.tiny_judges import make_hhem

QUESTION = {"id": "q", "question": "Where?", "choices": {"text": [*"abcde"], "label": [*"ABCDE"]}, "answerKey": "A"}


@pytest.fixture
def damaged(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with one weight that is no number."""
    return _damage(Path(shutil.copytree(tiny_model, tmp_path / "damaged")), part="down_proj")


@pytest.mark.parametrize("metrics", [("rouge_l",), ("rouge_l", "factual_rate")])
def test_no_benchmark_has_a_score_of_a_damaged_model(metrics: tuple[str, ...], damaged: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(QUESTION) + "\n")
    spec = EvaluationSpec(
        benchmarks=(
            BenchmarkSpec(name="demo_news"),
            BenchmarkSpec(name="arc_easy", path=str(questions)),
            BenchmarkSpec(name="commonsense_qa", path=str(questions)),
        ),
        limit=2,
        max_new_tokens=4,
        metrics=metrics,
    )
    kept: list[object] = []
    with pytest.raises(EvaluationError) as raised:
        evaluate(
            str(damaged),
            spec=spec,
            settings=Settings(data_dir=tmp_path / "data", offline=True),
            on_generations=kept.extend,
        )
    assert raised.value.what == (
        "demo_news: the model's logits are not finite; arc_easy: the model's likelihoods are not finite; "
        "commonsense_qa: the model's likelihoods are not finite"
    )
    assert "NaN" in raised.value.fix
    assert kept == []


def test_attention_that_is_not_finite_is_no_measure(damaged: Path, tiny_model: Path, tmp_path: Path) -> None:
    pairs = [("A ferry left the harbour.", "A ferry sank.")]
    settings = Settings(data_dir=tmp_path)
    for _ in range(2):
        (found,) = measure_summaries(
            load_lens_model(str(damaged), settings=settings), pairs, instruction="Sum up.", cache=tmp_path / "cache"
        )
        assert found.missing == "the model's attention weights are not finite"
    # Here a lens's fingerprint looks.
    _damage(damaged, part="down_proj", place=0)
    with pytest.raises(EvaluationError, match="the model's weights are not finite"):
        load_lens_model(str(damaged), settings=settings)
    (whole,) = measure_summaries(load_lens_model(str(tiny_model), settings=settings), pairs, instruction="Sum up.")
    assert whole.missing is None
    assert np.isfinite(whole.ratios_TLH).all()


def test_a_token_may_be_ruled_out() -> None:
    logits = torch.tensor([[0.5, -torch.inf]])
    assert FiniteLogits()(torch.zeros(1, 1, dtype=torch.long), logits) is logits
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(EvaluationError, match="not finite"):
            FiniteLogits()(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[0.5, wrong]]))


def test_a_metric_that_is_no_number_is_missing_with_its_reason() -> None:
    request = Request(item_id="1", instruction="Sum up.", source="A ferry left.", reference="A ferry left.")
    answer = Answer(request=request, prompt=Prompt(ids=[1], context_tokens=0), output="A ferry left.")
    metrics = Metrics(names=["support"], judges={"support": lambda _: [Verdict(score=float("nan"))]})
    assert metrics.judge([answer], names=["support"]) == {}
    assert metrics.missing == {"support": "support gives scores that are not finite"}


def test_a_damaged_judge_gives_no_score_and_whole_json(tmp_path: Path) -> None:
    make_hhem(tmp_path / "judge")
    _damage(tmp_path / "judge", part="encoder.final_layer_norm")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"document": "A ferry left.", "summary": "A ferry sank."}) + "\n")
    options = DetectorOptions(model=str(tmp_path / "judge"), settings=Settings(offline=True))
    assert detect_file("hhem", source=source, target=target, options=options) == 1
    (line,) = target.read_text().splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["score"], found["spans"]) == (None, [])
    assert "not finite" in found["missing"]


def _damage(directory: Path, *, part: str, place: int = 1) -> Path:
    file = directory / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if part in name)
    weights[name].view(-1)[place] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return directory
