"""The lens: published and own files, refusal of other models, windows, spans, factual rate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from services.contract.errors import InvalidInputError
from services.evaluation.lookback.fingerprint import fingerprint_model
from services.evaluation.lookback.lens import (
    SHIPPED,
    Lens,
    factual_rate,
    load_lens,
    score_spans,
    score_windows,
    summary_score,
    token_scores,
)
from tests.evaluation.lookback.models import make_decoder


def make_lens(**changes: object) -> Lens:
    fingerprint = fingerprint_model(make_decoder("llama"))
    fields = {"model": "tiny", "fingerprint": fingerprint, "layers": 3, "heads": 4, "intercept": -0.5}
    return Lens(**(fields | {"coef": list(np.linspace(-2, 3, 12))} | changes))


def ratios(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).random((tokens, 3, 4), dtype=np.float32)


OFFSETS = [(4 * index, 4 * index + 3) for index in range(11)]


@pytest.mark.parametrize("name", ["anno-cnndm-7b", "anno-nq-7b"])
@pytest.mark.parametrize("kind", ["predefined_span", "sliding_window_8"])
def test_published_classifiers_load(shared_data: Path, name: str, kind: str) -> None:
    path = shared_data / "lookback_lens" / f"classifier_{name}_{kind}.json"
    published = json.loads(path.read_text())
    lens = load_lens(path)
    assert (lens.layers, lens.heads, lens.threshold) == (32, 32, published["best_threshold"])
    assert lens.spans == ("predefined" if kind == "predefined_span" else "windows")
    classifier = LogisticRegression()
    classifier.coef_, classifier.intercept_ = np.array([published["coef"]]), np.array([published["intercept"]])
    classifier.classes_ = np.array(published["classes"])
    features = np.random.default_rng(1).random((5, 1024), dtype=np.float32)
    np.testing.assert_allclose(lens.probabilities(features), classifier.predict_proba(features)[:, 1], atol=1e-6)


def test_windows_are_means_over_eight_tokens() -> None:
    lens = make_lens()
    measured = ratios(11)
    windows = score_windows(lens, measured, offsets=OFFSETS)
    assert [(window.first, window.after) for window in windows] == [(0, 8), (1, 9), (2, 10), (3, 11)]
    assert windows[1].characters == (4, 35)
    logit = (
        sum(coef * measured[1:9, index // 4, index % 4].mean() for index, coef in enumerate(lens.coef)) + lens.intercept
    )
    assert windows[1].factual == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    [only] = score_windows(lens, measured[:5], offsets=OFFSETS[:5])
    assert (only.first, only.after) == (0, 5)


def test_predefined_spans_are_the_tokens_they_touch() -> None:
    lens = make_lens()
    [score] = score_spans(lens, ratios(11), offsets=OFFSETS, spans=[(6, 13)])
    assert (score.first, score.after) == (1, 4)
    features = ratios(11)[1:4].mean(axis=0).reshape(1, -1)
    assert score.factual == pytest.approx(float(lens.probabilities(features)[0]), abs=1e-6)
    with pytest.raises(InvalidInputError, match="hold no token"):
        score_spans(lens, ratios(11), offsets=OFFSETS, spans=[(3, 4)])


def test_factual_rate_and_token_scores() -> None:
    windows = score_windows(make_lens(), ratios(11), offsets=OFFSETS)
    factual = [window.factual for window in windows]
    threshold = sorted(factual)[1]
    assert factual_rate(windows, threshold=threshold) == 75
    assert factual_rate([], threshold=threshold) is None
    tokens = token_scores(windows, tokens=11)
    assert tokens[0] == pytest.approx(1 - factual[0])
    assert tokens[2] == pytest.approx(1 - np.mean(factual[:3]))
    assert 0 < summary_score(windows) < 1


def test_another_model_is_refused() -> None:
    lens = make_lens()
    other_architecture = fingerprint_model(make_decoder("qwen2"))
    with pytest.raises(InvalidInputError, match="model_type qwen2"):
        lens.check_model("other", other_architecture)
    model = make_decoder("llama")
    torch.manual_seed(9)
    model.apply(model._init_weights)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.raises(InvalidInputError, match=r"belongs to tiny .* another pre-training"):
        lens.check_model("other", fingerprint_model(model))


def test_the_same_model_and_its_fine_tuned_children_are_accepted() -> None:
    lens, model = make_lens(), make_decoder("llama")
    assert lens.check_model("same", fingerprint_model(model)) == "same"
    assert lens.check_model("rounded", fingerprint_model(make_decoder("llama").to(torch.bfloat16))) == "same"
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    assert lens.check_model("student", fingerprint_model(model)) == "fine-tuned"


def test_published_classifiers_are_refused_for_other_sizes(shared_data: Path) -> None:
    lens = load_lens(shared_data / "lookback_lens" / "classifier_anno-nq-7b_predefined_span.json")
    with pytest.raises(InvalidInputError, match="Llama-2-7b-chat"):
        lens.check_model("tiny", fingerprint_model(make_decoder("llama")))


def test_ratios_of_another_shape_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="3 layers of 4 heads"):
        score_windows(make_lens(), np.zeros((9, 2, 4), np.float32), offsets=OFFSETS)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not a lens"),
        ('{"coef": [1.0]}', "is not a lens: model"),
        ('{"coef": [1.0], "intercept": 0, "classes": [0, 1], "best_threshold": 0.5}', "is not a lens: coef"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "lens.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=what):
        load_lens(path)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_lens(tmp_path / "absent.json")


def test_coefficients_must_fit_the_heads() -> None:
    with pytest.raises(ValueError, match="12 coefficients for 3 layers of 5 heads"):
        make_lens(heads=5)


def test_shipped_lenses_belong_to_their_model_and_beat_novel_words() -> None:
    for path in SHIPPED.values():
        lens = load_lens(path)
        validation = lens.training["cross_validation"]
        assert (lens.layers, lens.heads) == (30, 9)
        assert validation["words"]["low"] > validation["novel_words"]["words"]["high"]
