"""Overconfidence against a plain computation in float64, scikit-learn's calibration curve and scipy's densities."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from sklearn.calibration import calibration_curve
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from services.cli.main import app
from services.contract.errors import InvalidInputError
from services.contract.evaluation_spec import EvaluationSpec
from services.contract.settings import Settings
from services.evaluation.calibration import measure_calibration, reliability_bins
from services.evaluation.evaluate import evaluate
from services.evaluation.model import load_model
from services.evaluation.multiple_choice import CALIBRATED, answer_multiple_choice
from services.evaluation.overconfidence import densities

QUESTIONS = 25


@pytest.fixture(scope="module")
def file(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first questions; a file of their own, so that examples come from among them too."""
    lines = (shared_data / "commonsense_qa" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    path = tmp_path_factory.mktemp("csqa") / "validation.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(file: Path, tiny_model: Path) -> tuple[np.ndarray, list[int]]:
    """(25, 5) log-likelihoods by one forward pass per choice in float64, and the right places."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    likelihoods, right = [], []
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        options = "".join(f"{label}. {text}\n" for label, text in zip("ABCDE", row["choices"]["text"], strict=True))
        context = f"Question: {row['question'].strip()}\n{options}Answer:"
        likelihoods.append([log_likelihood(model, tokenizer, context, f" {label}") for label in "ABCDE"])
        right.append("ABCDE".index(row["answerKey"]))
    return np.array(likelihoods), right


@torch.inference_mode()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    prefix = tokenizer.encode(context, add_special_tokens=False)
    ids = tokenizer.encode(context + continuation, add_special_tokens=False)
    rows = model(torch.tensor([ids[-513:-1]])).logits[0].log_softmax(-1)
    new = ids[len(prefix) :]
    return float(sum(rows[len(rows) - len(new) + place, id_] for place, id_ in enumerate(new)))


def answered(tiny_model: Path, file: Path, tmp_path: Path, *, examples: int = 0):
    from services.contract.evaluation_spec import BenchmarkSpec

    return answer_multiple_choice(
        BenchmarkSpec(name=CALIBRATED, path=str(file)),
        # Its positions are computed, so that it reads as far as it is told to.
        loaded=replace(load_model(str(tiny_model)), window=4096),
        directory=str(tiny_model),
        limit=None,
        batch_size=4,
        settings=Settings(data_dir=tmp_path, offline=True),
        examples=examples,
    )


def test_likelihoods_and_everything_made_of_them(
    plain: tuple[np.ndarray, list[int]], tiny_model: Path, file: Path, tmp_path: Path
) -> None:
    likelihoods, right = plain
    found = answered(tiny_model, file, tmp_path)
    assert np.array([item.likelihoods for item in found.items]) == pytest.approx(likelihoods, abs=2e-3)
    assert [item.right for item in found.items] == right
    probabilities = special.softmax(likelihoods, axis=1)
    calibration = measure_calibration(likelihoods.tolist(), right)
    wrong = np.array([np.delete(row, place) for row, place in zip(likelihoods, right, strict=True)])
    assert calibration.accuracy == pytest.approx(np.mean(likelihoods.argmax(1) == right))
    assert calibration.entropy == pytest.approx(stats.entropy(probabilities, axis=1).mean())
    assert calibration.wrong_nll == pytest.approx(-wrong.mean())
    assert calibration.confidence == pytest.approx(probabilities.max(1).mean())
    scores = {score.metric: (score.value, score.higher_is_better) for score in found.scores}
    assert scores["wrong_nll"] == (pytest.approx(-wrong.mean(), abs=2e-3), True)
    assert scores["acc"][0] == pytest.approx(100 * calibration.accuracy)
    assert scores["ece"][1] is False


def test_reliability_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(2)
    confidence = random.beta(2, 2, 3000)
    correct = random.random(3000) < confidence**1.5
    bins = reliability_bins(confidence, correct)
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=15, strategy="uniform")
    assert [one.accuracy for one in bins] == pytest.approx(list(accuracy))
    assert [one.confidence for one in bins] == pytest.approx(list(mean_confidence))
    counts, _ = np.histogram(confidence, bins=15, range=(0, 1))
    assert [one.items for one in bins] == [count for count in counts if count]


def test_ece_by_hand() -> None:
    # Two questions at confidence 0.9, one right; two at 0.6, both right: (2 x |0.5 - 0.9| + 2 x |1 - 0.6|) / 4.
    likelihoods = [np.log([0.9, 0.1]), np.log([0.9, 0.1]), np.log([0.6, 0.4]), np.log([0.6, 0.4])]
    found = measure_calibration([list(row) for row in likelihoods], [0, 1, 0, 0])
    assert found.ece == pytest.approx(0.4)
    assert [(one.accuracy, one.items) for one in found.bins] == [(1.0, 2), (0.5, 2)]
    assert reliability_bins(np.array([0.0, 1.0]), np.array([True, True]))[0].items == 1


def test_examples_come_before_the_question_and_never_hold_it(tiny_model: Path, file: Path, tmp_path: Path) -> None:
    found = answered(tiny_model, file, tmp_path, examples=3)
    for item in found.items:
        asked = item.question.rpartition("Question: ")[2].partition("\n")[0]
        shown = [part.partition("\n")[0] for part in item.question.split("Question: ")[1:-1]]
        assert len(shown) == 3
        assert asked not in shown
        assert item.question.count("Answer: ") == 3
    assert answered(tiny_model, file, tmp_path).items[0].likelihoods != found.items[0].likelihoods


def test_densities_are_scipys_and_hold_all_of_the_mass() -> None:
    random = np.random.default_rng(0)
    samples = {"A": list(random.gamma(9, 0.5, 300)), "B": list(random.normal(8, 1.0, 200))}
    found = densities(samples)
    for label, values in samples.items():
        positions, density = found[label]
        assert density == pytest.approx(stats.gaussian_kde(values)(positions))
        assert integrate.trapezoid(density, positions) == pytest.approx(1.0, abs=0.01)
    assert np.array_equal(found["A"][0], found["B"][0])
    with pytest.raises(InvalidInputError, match="C gives every wrong answer the same likelihood"):
        densities({"C": [1.0, 1.0]})


def test_the_command_compares_two_models(
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from services.models.tiny import make_tiny_model

    other = make_tiny_model(tmp_path_factory.mktemp("other"), seed=5)
    monkeypatch.setenv("SMOOTHKD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SMOOTHKD_OFFLINE", "true")
    out = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--model", str(other), "--data", str(file), "--limit", "8"]
    result = CliRunner().invoke(app, ["overconfidence", *arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    models = json.loads((out / "overconfidence.json").read_text(encoding="utf-8"))
    assert [(one["model"], len(one["wrong_nll"])) for one in models] == [(tiny_model.name, 32), (other.name, 32)]
    page = (out / "overconfidence.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 2
    assert page.count("<svg") == 0
    assert (out / "density.svg").read_text(encoding="utf-8").count(tiny_model.name) == 1
    twice = CliRunner().invoke(app, ["overconfidence", *arguments[:2], *arguments[:2], "--out", str(out)])
    assert isinstance(twice.exception, InvalidInputError)


def test_each_model_may_have_examples_of_its_own(
    tiny_model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTHKD_DATA_DIR", str(tmp_path / "data"))
    other = tmp_path / "other"
    other.symlink_to(tiny_model)
    command = ["overconfidence", "--model", str(tiny_model), "--model", str(other), "--data", str(file)]
    command += ["--out", str(tmp_path / "out"), "--limit", "6"]
    result = CliRunner().invoke(app, [*command, "--examples", "0", "--examples", "2"])
    assert result.exit_code == 0, result.output
    plain, shown = json.loads((tmp_path / "out" / "overconfidence.json").read_text(encoding="utf-8"))
    assert (plain["model"], shown["model"]) == (f"{tiny_model.name} (0 examples)", "other (2 examples)")
    for one, examples in ((plain, 0), (shown, 2)):
        alone = answered(tiny_model, file, tmp_path, examples=examples).items[:6]
        expected = [-x for item in alone for place, x in enumerate(item.likelihoods) if place != item.right]
        assert one["wrong_nll"] == pytest.approx(expected, abs=1e-4)
    assert plain["wrong_nll"] != pytest.approx(shown["wrong_nll"], abs=1e-3)
    same = ["overconfidence", *["--model", str(tiny_model)] * 2, *command[5:]]
    both = CliRunner().invoke(app, [*same, "--examples", "0", "--examples", "2"])
    assert both.exit_code == 0, both.output
    found = json.loads((tmp_path / "out" / "overconfidence.json").read_text(encoding="utf-8"))
    assert [one["model"] for one in found] == [f"{tiny_model.name} ({count} examples)" for count in (0, 2)]
    assert [one["wrong_nll"] for one in found] == [plain["wrong_nll"], shown["wrong_nll"]]
    twice = CliRunner().invoke(app, [*same, "--examples", "2", "--examples", "2"])
    assert isinstance(twice.exception, InvalidInputError)
    wrong = CliRunner().invoke(app, [*command, *["--examples", "1"] * 3])
    assert isinstance(wrong.exception, InvalidInputError)
    assert "2 models have 3 numbers of examples" in wrong.exception.what


def test_an_evaluation_keeps_each_question_with_the_choice(tiny_model: Path, file: Path, tmp_path: Path) -> None:
    kept = []
    scores = evaluate(
        str(tiny_model),
        spec=EvaluationSpec.model_validate({"benchmarks": [{"name": CALIBRATED, "path": str(file)}], "limit": 10}),
        settings=Settings(data_dir=tmp_path, offline=True),
        on_generations=kept.extend,
    )
    assert [score.metric for score in scores] == ["acc", "wrong_nll", "ece"]
    assert len(kept) == 10
    assert scores[0].value == pytest.approx(np.mean([one.scores["acc"] for one in kept]))
    assert scores[1].value == pytest.approx(np.mean([one.scores["wrong_nll"] for one in kept]))
    assert all((one.output == one.reference) == (one.scores["acc"] == 100) for one in kept)
    assert kept[0].item_id == "csqa-0"


@pytest.mark.parametrize(
    ("out", "line", "said"),
    [
        ("file", "", "file can be no directory: File exists"),
        ("new", '{"question": "Why?"}', "line 1: no column 'choices', 'answerKey'"),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(out: str, line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    command = ["overconfidence", "--model", str(tmp_path / "model"), "--out", str(tmp_path / out)]
    if line:
        (tmp_path / "rows.jsonl").write_text(line)
        command += ["--data", str(tmp_path / "rows.jsonl")]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, InvalidInputError)
    assert said in done.exception.what
