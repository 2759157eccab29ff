"""Fitting, cross-validation by document, and the commands from end to end on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from services.contract.errors import DatasetError, InvalidInputError
from services.contract.settings import Settings
from services.evaluation.lookback import features
from services.evaluation.lookback.detect import detect_generated, detect_lookback
from services.evaluation.lookback.examples import encode_document
from services.evaluation.lookback.features import MeasuredSummary, load_lens_model
from services.evaluation.lookback.fingerprint import ModelFingerprint
from services.evaluation.lookback.fit import TrainingItem, best_threshold, collect_spans, cross_validate, fit_lens
from services.evaluation.lookback.judge import Judge
from services.evaluation.lookback.labels import LabelledSummary
from services.evaluation.lookback.lens import Lens, load_lens
from services.evaluation.lookback.measure import generate_measured
from services.evaluation.lookback.train import evaluate_lens, train_lens
from services.evaluation.lookback.validation import report_novel_words, report_scores, validate
from tests.evaluation.lookback.fake_judge import serve_judge
from tests.evaluation.lookback.models import eager_ratios

SETTINGS = Settings(offline=True)
DOCUMENTS = [
    "The harbour master said that 14 ferries had been repaired on Tuesday and that no sailing would be cancelled.",
    "Three colours of the sea are named in the article: blue, green and grey, the harbour master said.",
    "What is the capital? The article said that Ostrel is, and that it has been for two hundred years.",
    "No sailing would be cancelled on Tuesday, the harbour said, for the ferries had all been repaired.",
    "Two sentences are in the article, and the following one named the capital of the sea.",
]


def untrained(spans: str = "windows") -> Lens:
    fingerprint = ModelFingerprint(architecture={}, weights=None)
    return Lens(model="m", fingerprint=fingerprint, spans=spans, layers=2, heads=3, intercept=0.0, coef=[0.0] * 6)


def synthetic_items(*, documents: int, signal: float) -> list[TrainingItem]:
    """Three summaries of 16 one-letter words for each document; hallucinated words have one head look back less."""
    random = np.random.default_rng(0)
    items = []
    for document in range(documents):
        # A document's own level on another head must not leak from training to held-out documents.
        level = random.normal()
        for _ in range(3):
            first = int(random.integers(0, 12))
            hallucinated = np.zeros(16, dtype=bool)
            hallucinated[first : first + 9] = True
            ratios = 0.5 + 0.05 * random.normal(size=(16, 2, 3)).astype(np.float32)
            ratios[:, 0, 1] += 0.2 * level
            ratios[:, 1, 2] -= signal * hallucinated
            offsets = [(2 * index, 2 * index + 1) for index in range(16)]
            spans = ((2 * first, min(2 * (first + 9), 31)),)
            summary = LabelledSummary(document=f"x {document}", summary=" ".join("abcdefghijklmnop"), spans=spans)
            items.append(
                TrainingItem(
                    summary=summary, measured=MeasuredSummary(ratios_TLH=ratios, offsets=offsets), group=document
                )
            )
    return items


def test_the_fit_is_scikit_learns_on_standardised_ratios() -> None:
    items = synthetic_items(documents=12, signal=0.1)
    lens, strength = fit_lens(untrained(), items)
    spans = collect_spans(items, kind="windows")
    standard = (spans.ratios_NF - spans.ratios_NF.mean(axis=0)) / spans.ratios_NF.std(axis=0)
    reference = LogisticRegression(C=strength, max_iter=1000).fit(standard, spans.factual_N)
    np.testing.assert_allclose(lens.probabilities(spans.ratios_NF), reference.predict_proba(standard)[:, 1], atol=2e-3)
    # Head 2 of layer 1 carries the signal: layer-major it is the last of six.
    assert np.argmax(lens.coef) == 5


def test_windows_and_predefined_spans_are_labelled_as_in_the_paper() -> None:
    item = synthetic_items(documents=1, signal=0.1)[0]
    hallucinated = [
        start < item.summary.spans[0][1] and item.summary.spans[0][0] < end for start, end in item.measured.offsets
    ]
    windows = collect_spans([item], kind="windows")
    assert windows.factual_N.tolist() == [not any(hallucinated[start : start + 8]) for start in range(9)]
    np.testing.assert_allclose(windows.ratios_NF[3], item.measured.ratios_TLH[3:11].mean(axis=0).reshape(-1), atol=1e-6)
    first, after = hallucinated.index(True), 16 - hallucinated[::-1].index(True)
    stretches = [(a, b) for a, b in [(0, first), (first, after), (after, 16)] if a < b]
    predefined = collect_spans([item], kind="predefined")
    assert predefined.factual_N.tolist() == [a != first for a, _ in stretches]
    for row, (a, b) in zip(predefined.ratios_NF, stretches, strict=True):
        np.testing.assert_allclose(row, item.measured.ratios_TLH[a:b].mean(axis=0).reshape(-1), atol=1e-6)


def test_cross_validation_finds_a_signal_and_invents_none() -> None:
    found, _ = cross_validate(untrained(), synthetic_items(documents=20, signal=0.2), folds=5, seed=0)
    assert found.words.value is not None
    assert found.words.value > 0.8
    assert found.windows.value is not None
    assert found.windows.value > 0.95
    absent, _ = cross_validate(untrained(), synthetic_items(documents=20, signal=0.0), folds=5, seed=0)
    assert absent.windows.low is not None
    assert absent.windows.low < 0.5 < absent.windows.high


def test_the_threshold_has_the_best_balanced_accuracy() -> None:
    items = synthetic_items(documents=8, signal=0.05)
    lens, _ = fit_lens(untrained(), items)
    scored = [validate(lens, item.summary, item.measured, group=item.group) for item in items]
    factual = np.array([window.factual for item in scored for window in item.windows])
    wrong = np.array([flag for item in scored for flag in item.windows_hallucinated])

    def balanced(threshold: float) -> float:
        return (factual[wrong] < threshold).mean() + (factual[~wrong] >= threshold).mean()

    assert balanced(best_threshold(scored)) >= max(balanced(value) for value in factual) - 0.005


def test_the_baseline_counts_words_that_the_document_lacks() -> None:
    summaries = [
        LabelledSummary(document="Ferries were repaired.", summary="The ferry sank.", spans=((4, 15),)),
        LabelledSummary(document="Ferries were repaired.", summary="Ferries repaired."),
    ]
    report = report_novel_words(summaries)
    # Of two hallucinated words "sank." is novel and "ferry" is not; of three others "The" is novel.
    assert report.words.value == pytest.approx((0.5 + 1 + 1 + 0 + 0.5 + 0.5) / 6, abs=1e-4)
    assert report.summaries.value == 1


def test_too_few_documents_or_kinds_are_refused() -> None:
    items = synthetic_items(documents=3, signal=0.1)
    with pytest.raises(DatasetError, match="3 documents are too few for 5 folds"):
        cross_validate(untrained(), items, folds=5, seed=0)
    with pytest.raises(DatasetError, match="every span is hallucinated"):
        fit_lens(untrained(), [items[0]] if not collect_spans([items[0]], kind="windows").factual_N.any() else [])


def write_data(path: Path, *, labelled: bool = True) -> Path:
    rows = []
    for document in DOCUMENTS:
        words = document.split()
        true, false = " ".join(words[:9]), " ".join([*words[4:9], "zebra", "quiz", "fox", "jumped", "high"])
        spans = [{"start": false.index("zebra"), "end": len(false)}]
        rows.append({"document": document, "summary": true, "spans": []})
        rows.append(
            {"document": document, "summary": false, "spans": spans}
            if labelled
            else {"document": document, "summary": false}
        )
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_train_evaluate_and_detect(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data.jsonl")
    out, cache = tmp_path / "lenses" / "lens.json", tmp_path / "cache"
    seen: list[tuple[int, int]] = []
    lens = train_lens(
        data, model=str(tiny_model), out=out, settings=SETTINGS, cache=cache, progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (10, 10)
    assert load_lens(out) == lens
    assert (lens.layers, lens.heads) == (2, 4)
    assert lens.training["documents"] == 5
    assert lens.training["cross_validation"]["words"]["items"] == sum(
        len(json.loads(line)["summary"].split()) for line in data.read_text().splitlines()
    )
    # Everything is measured already: training again reads no text.
    monkeypatch.setattr(features, "measure_answers", None)
    assert train_lens(data, model=str(tiny_model), out=out, settings=SETTINGS, cache=cache) == lens
    report = evaluate_lens(data, lens=out, model=str(tiny_model), settings=SETTINGS, cache=cache)
    assert report.seen_in_training
    assert report.words.value is not None
    assert report.novel_words is not None
    assert report.novel_words.words.value is not None
    assert report.novel_words.words.value > 0.9


def test_detections_agree_with_eager_attention(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "lens.json"
    lens = train_lens(write_data(tmp_path / "data.jsonl"), model=str(tiny_model), out=out, settings=SETTINGS)
    summary = "  The harbour master named zebra and fox on Tuesday."
    pairs = [(DOCUMENTS[0], summary), (DOCUMENTS[0], " "), (DOCUMENTS[1], "word " * 600)]
    found, empty, too_long = detect_lookback(pairs, model=str(tiny_model), lens=out, settings=SETTINGS)
    lens_model = load_lens_model(str(tiny_model), settings=SETTINGS)
    prompt = encode_document(lens_model.tokenizer, document=DOCUMENTS[0])
    answer = lens_model.tokenizer.encode(summary.strip())
    ratios = eager_ratios(lens_model.model, prompt, answer).flatten(1)
    windows = [ratios[start : start + 8].mean(dim=0) for start in range(len(answer) - 7)]
    expected = [
        float(1 / (1 + np.exp(-(window.double().numpy() @ np.array(lens.coef) + lens.intercept)))) for window in windows
    ]
    np.testing.assert_allclose([window.factual for window in found.windows], expected, atol=1e-4)
    assert found.score == pytest.approx(1 - np.mean(expected), abs=1e-4)
    assert found.factual_rate == pytest.approx(100 * np.mean(np.array(expected) >= lens.threshold))
    for span in found.spans:
        assert span.detector == "lookback"
        assert summary[span.start : span.end] == summary[span.start : span.end].strip()
        assert span.score > 1 - lens.threshold
    assert (empty.score, empty.factual_rate, empty.missing) == (None, None, "the summary is empty")
    assert too_long.missing is not None
    assert "no room" in too_long.missing


def test_generated_and_given_text_score_alike(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "lens.json"
    lens = train_lens(write_data(tmp_path / "data.jsonl"), model=str(tiny_model), out=out, settings=SETTINGS)
    lens_model = load_lens_model(str(tiny_model), settings=SETTINGS)
    prompt = encode_document(lens_model.tokenizer, document=DOCUMENTS[2])
    [answer] = generate_measured(lens_model.model, [prompt], max_new_tokens=20, pad_id=0, end_ids=[])
    text, detection = detect_generated(lens, answer, tokenizer=lens_model.tokenizer)
    assert text == lens_model.tokenizer.decode(answer.ids, skip_special_tokens=True)
    ratios = eager_ratios(lens_model.model, prompt, answer.ids).flatten(1)
    first = float(lens.probabilities(ratios[:8].mean(dim=0, keepdim=True).numpy())[0])
    assert detection.windows[0].factual == pytest.approx(first, abs=1e-4)
    assert len(detection.windows) == 13


def test_a_lens_of_another_model_is_refused_before_anything_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "lens.json"
    lens = train_lens(write_data(tmp_path / "data.jsonl"), model=str(tiny_model), out=out, settings=SETTINGS)
    weights = list(np.random.default_rng(0).normal(size=256))
    other = lens.model_copy(update={"fingerprint": lens.fingerprint.model_copy(update={"weights": weights})})
    out.write_text(other.model_dump_json())
    with pytest.raises(InvalidInputError, match="another pre-training"):
        detect_lookback([(DOCUMENTS[0], "Text.")], model=str(tiny_model), lens=out, settings=SETTINGS)


@pytest.mark.parametrize("out", ["file/lens.json", "folder"])
def test_a_lens_that_cannot_be_written_is_told_before_anything_is_measured(out: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInputError, match=f"{out} cannot be written: (File exists|Is a directory)"):
        # There is no such model, which is not what is told.
        train_lens(data, model="./none", out=tmp_path / out, settings=SETTINGS)
    assert not any((tmp_path / "folder").iterdir())


def test_missing_labels_come_from_the_judge(tiny_model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl", labelled=False)
    out = tmp_path / "lens.json"
    with pytest.raises(DatasetError, match=r"5 of 10 records .* have no spans"):
        train_lens(data, model=str(tiny_model), out=out, settings=SETTINGS)
    answers = [json.dumps({"unsupported": ["zebra quiz fox jumped high"]})] * 5
    with serve_judge(list(answers)) as server:
        judge = Judge(url=server.url, model="m")
        judged = train_lens(data, model=str(tiny_model), out=out, settings=SETTINGS, judge=judge)
    human = train_lens(
        write_data(tmp_path / "human.jsonl"), model=str(tiny_model), out=tmp_path / "human.json", settings=SETTINGS
    )
    assert judged.coef == human.coef
    assert len((tmp_path / "lens.labels.jsonl").read_text().splitlines()) == 5


def test_a_report_pools_words_windows_and_summaries() -> None:
    items = synthetic_items(documents=4, signal=0.3)
    lens, _ = fit_lens(untrained(), items)
    scored = [validate(lens, item.summary, item.measured, group=item.group) for item in items]
    report = report_scores(scored)
    assert (report.words.items, report.windows.items, report.summaries.items) == (12 * 16, 12 * 9, 12)
    assert report.summaries.missing == "every item has the same label"


def test_what_is_learnt_of_a_document_does_not_count() -> None:
    random = np.random.default_rng(2)
    items = []
    for document in range(24):
        fingerprint = random.normal(size=(1, 2, 40))
        text = "abcdefghijkl"
        summary = LabelledSummary(document=str(document), summary=text, spans=((0, 12),) if document % 2 else ())
        for _ in range(4):
            ratios = (fingerprint + 0.01 * random.normal(size=(12, 2, 40))).astype(np.float32)
            offsets = [(index, index + 1) for index in range(12)]
            measured = MeasuredSummary(ratios_TLH=ratios, offsets=offsets)
            items.append(TrainingItem(summary=summary, measured=measured, group=document))
    lens = untrained().model_copy(update={"layers": 2, "heads": 40, "coef": [0.0] * 80})
    report, _ = cross_validate(lens, items, folds=4, seed=0)
    assert report.windows.low is not None
    assert report.windows.low < 0.5 < report.windows.high
    assert report.summaries.value is not None
    assert report.summaries.value < 0.75


@pytest.mark.slow
def test_the_command_asks_the_judge_with_the_key_of_the_environment(tiny_model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl", labelled=False)
    command = [sys.executable, "-m", "services.cli.main", "lens", "train", str(data), "--model", str(tiny_model)]
    command += ["--out", str(tmp_path / "lens.json")]
    environment = {**os.environ, "SMOOTHKD_JUDGE_KEY": "secret", "SMOOTHKD_OFFLINE": "1"}
    answers = [json.dumps({"unsupported": ["zebra quiz fox jumped high"]})] * 5
    with serve_judge(list(answers)) as server:
        asked = [*command, "--judge-url", server.url, "--judge-model", "m"]
        result = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert server.keys == ["Bearer secret"] * 5
    assert json.loads(result.stdout)["training"]["documents"] == 5
    assert load_lens(tmp_path / "lens.json").training["summaries"] == 10
    half = subprocess.run([*command, "--judge-model", "m"], env=environment, capture_output=True, text=True)
    assert half.returncode == 2
    assert "--judge-url and --judge-model" in half.stderr
