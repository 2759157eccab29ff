"""Every metric inside an evaluation: its value by an independent way, its spans, and what happens without it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from services.contract.errors import SpecError
from services.contract.evaluation_spec import EvaluationSpec
from services.contract.prompt import SUMMARISE
from services.contract.records import Generation, Score
from services.contract.settings import Settings
from services.contract.spec_reading import parse_evaluation
from services.evaluation import metrics as metrics_module
from services.evaluation.answering import Answer
from services.evaluation.consistency.detector import detect_consistency, load_detector
from services.evaluation.evaluate import evaluate
from services.evaluation.lookback.detect import detect_generated, detect_lookback
from services.evaluation.lookback.examples import encode_document
from services.evaluation.lookback.fingerprint import fingerprint_model
from services.evaluation.lookback.lens import Lens
from services.evaluation.lookback.measure import generate_measured
from services.evaluation.model import load_model
from services.evaluation.self_consistency import compare
from services.evaluation.verdict import Verdict
from services.models.tiny import make_tiny_model
from tests.evaluation.bertscore_reference import plain_bertscore
from tests.evaluation.tiny_judges import TEXTS, make_encoder

ARTICLES = [
    "The harbour master of Ostrel said on Tuesday that 14 ferries had been repaired.",
    "Rain fell on the valley. Two bridges were closed, and a school moved its lessons to the town hall.",
    "A mayor opened a library with 9,000 books.",
]


@pytest.fixture
def settings(tmp_path: Path, minilm: Path) -> Settings:
    models = tmp_path / "data" / "models"
    models.mkdir(parents=True)
    (models / "all-minilm-l6-v2").symlink_to(minilm)
    return Settings(data_dir=tmp_path / "data", offline=True)


@pytest.fixture
def benchmark(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "xsum.jsonl"
    rows = [{"id": str(n), "document": text, "summary": "Ferries were repaired."} for n, text in enumerate(ARTICLES)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "xsum", "path": str(file)}


def test_consistency_is_the_detectors_word_and_keeps_its_spans(
    tiny_model: Path, settings: Settings, benchmark: dict[str, str]
) -> None:
    scores, generations = _evaluate(tiny_model, settings, benchmark, metrics=["support", "consistency"])
    detections = detect_consistency([(one.source, one.output) for one in generations])
    expected = [100 * (1 - one.score) for one in detections if one.score is not None]
    assert scores["consistency"].value == pytest.approx(sum(expected) / len(expected), abs=0.1)
    assert scores["consistency"].items == len(expected) > 0
    for generation, detection in zip(generations, detections, strict=True):
        spans = [span for span in generation.spans if span.detector == "consistency"]
        assert [(span.start, span.end) for span in spans] == [(span.start, span.end) for span in detection.spans]
    assert {"support", "consistency"} == {span.detector for one in generations for span in one.spans}


def test_a_fitting_lens_judges_what_was_generated(
    tiny_model: Path, settings: Settings, benchmark: dict[str, str], tmp_path: Path
) -> None:
    file, lens = _lens(tiny_model, tmp_path)
    scores, generations = _evaluate(
        tiny_model, settings, benchmark, metrics=["rouge_l", "factual_rate"], judges={"lens": str(file)}
    )
    plain = _evaluate(tiny_model, settings, benchmark, metrics=["rouge_l"])[1]
    assert [one.output for one in generations] == [one.output for one in plain]
    loaded = load_model(str(tiny_model))
    rates = []
    for generation in generations:
        prompt = encode_document(loaded.tokenizer, document=generation.source, instruction=SUMMARISE["xsum"])
        [measured] = generate_measured(loaded.model, [prompt], max_new_tokens=20, pad_id=0, end_ids=loaded.eos_ids)
        text, detection = detect_generated(lens, measured, tokenizer=loaded.tokenizer)
        assert generation.scores.get("factual_rate") == pytest.approx(detection.factual_rate)
        ours = [(text.strip()[span.start : span.end], span.score) for span in generation.spans]
        theirs = [(text[span.start : span.end], pytest.approx(span.score, abs=1e-4)) for span in detection.spans]
        assert ours == theirs
        rates.append(detection.factual_rate)
    assert scores["factual_rate"].value == pytest.approx(np.mean([rate for rate in rates if rate is not None]))
    assert 0 < scores["factual_rate"].value < 100


def test_a_lens_of_another_model_is_a_reason_not_a_number(
    tiny_model: Path, settings: Settings, benchmark: dict[str, str], tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=7)
    file, _ = _lens(other, tmp_path)
    judges = {"lens": str(file)}
    scores, generations = _evaluate(tiny_model, settings, benchmark, metrics=["rouge_l", "factual_rate"], judges=judges)
    assert scores["factual_rate"].value is None
    assert "another pre-training" in str(scores["factual_rate"].missing)
    assert all("factual_rate" not in one.scores for one in generations)


def test_documents_that_lose_their_end_to_a_lens_are_counted(
    tiny_model: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, _ = _lens(tiny_model, tmp_path)
    pairs = [(ARTICLES[0] * count, "Ferries were repaired.") for count in (1, 60, 1)]
    long, short = (
        detect_lookback(some, model=str(tiny_model), lens=file, settings=settings) for some in (pairs, pairs[:1])
    )
    assert [one.truncated for one in long] == [False, True, False]
    # What else is computed beside it changes its last digits.
    assert long[0].score == pytest.approx(short[0].score, abs=1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 documents do not fit into the model's window of 512 tokens beside their summaries and were read "
        "without their end"
    ]


def test_known_outputs_get_the_metrics_that_they_lack(
    tiny_model: Path, settings: Settings, benchmark: dict[str, str]
) -> None:
    _, first = _evaluate(tiny_model, settings, benchmark, metrics=["rouge_l", "support"])
    wanted = ["support", "consistency", "chrf"]
    scores, again = _evaluate(tiny_model, settings, benchmark, metrics=wanted, known=first)
    fresh_scores, fresh = _evaluate(tiny_model, settings, benchmark, metrics=wanted)
    assert scores == fresh_scores
    for one, new in zip(again, fresh, strict=True):
        assert {**one.scores, "rouge_l": 0} == {**new.scores, "rouge_l": 0}
        assert "rouge_l" in one.scores
        assert one.spans == new.spans


def test_a_metric_that_fails_is_missing_and_the_others_stay(
    tiny_model: Path, settings: Settings, benchmark: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(output: str, *, reference: str) -> float:
        calls.append(output)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return 50.0

    monkeypatch.setattr(metrics_module, "chrf", fail)
    scores, _ = _evaluate(tiny_model, settings, benchmark, metrics=["chrf", "rouge_l"], batch_size=1)
    assert (scores["chrf"].value, scores["chrf"].missing) == (None, "RuntimeError: out of memory")
    assert scores["rouge_l"].items == 3


def test_reasons_of_outputs_that_cannot_be_judged_are_named_once(
    tiny_model: Path,
    settings: Settings,
    benchmark: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reasons = iter(["more tokens than are read", None, "more tokens than are read"])

    def judge(answers: Sequence[Answer]) -> list[Verdict]:
        found = [next(reasons) for _ in answers]
        return [Verdict(score=None if reason else 80.0, missing=reason) for reason in found]

    monkeypatch.setattr(metrics_module, "_support", judge)
    scores, _ = _evaluate(tiny_model, settings, benchmark, metrics=["support"], batch_size=1)
    assert (scores["support"].value, scores["support"].items, scores["support"].missing) == (80.0, 1, None)
    assert (
        "2 of 3 outputs have no support: more tokens than are read" in [one.getMessage() for one in caplog.records][-1]
    )
    reasons = iter(["too many tokens", "no words", "too many tokens"])
    scores, _ = _evaluate(tiny_model, settings, benchmark, metrics=["support"], batch_size=1)
    assert (scores["support"].value, scores["support"].missing) == (None, "too many tokens; no words")


def test_references_in_a_script_that_rouge_does_not_read_leave_it_out(
    tiny_model: Path, settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "xsum.jsonl"
    rows = [{"id": str(n), "document": text, "summary": "Мэр купил 15 книг."} for n, text in enumerate(ARTICLES)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = {"name": "xsum", "path": str(file)}
    scores, _ = _evaluate(tiny_model, settings, benchmark, metrics=["rouge_l", "chrf"])
    assert (scores["rouge_l"].value, scores["rouge_l"].items, scores["chrf"].items) == (None, 0, 3)
    assert "in a script that the metric does not read" in str(scores["rouge_l"].missing)
    rows[0]["summary"] = "A mayor."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores, _ = _evaluate(tiny_model, settings, benchmark, metrics=["rouge_l"])
    assert scores["rouge_l"].items == 1


def test_self_consistency_compares_with_samples_that_stay_the_same(
    tiny_model: Path, settings: Settings, benchmark: dict[str, str]
) -> None:
    drawn = [
        _evaluate(tiny_model, settings, benchmark, metrics=["self_consistency"], samples=2, batch_size=size)
        for size in (1, 3)
    ]
    assert drawn[0][0]["self_consistency"].value == pytest.approx(drawn[1][0]["self_consistency"].value, abs=0.01)
    assert 0 <= drawn[0][0]["self_consistency"].value <= 100


def test_self_consistency_is_the_mean_over_sentences_and_samples() -> None:
    detector = load_detector()
    output = "The harbour of Ostrel has 14 ferries. A casino was opened by Paolo Ricci."
    samples = [ARTICLES[0], "Fourteen ferries were repaired in the harbour of Ostrel.", ""]
    verdict = compare(output, samples, detector=detector)
    sentences = [output[:37], output[38:]]
    supported = [
        np.mean([1 - detector.detect([(sample, sentence)])[0].score for sample in samples]) for sentence in sentences
    ]
    assert verdict.score == pytest.approx(100 * np.mean(supported), abs=0.5)
    assert supported[0] > supported[1]
    marked = [output[span.start : span.end] for span in verdict.spans]
    assert marked == [text for text, share in zip(sentences, supported, strict=True) if share < 0.5]
    assert compare("...", samples, detector=detector).score is None


def test_bertscore_with_idf_weighs_by_all_references_whatever_a_batch_holds(
    tiny_model: Path, settings: Settings, minilm: Path, tmp_path: Path
) -> None:
    references = ["Ferries were repaired.", "Two bridges were closed.", "A mayor opened a library."]
    file = tmp_path / "xsum.jsonl"
    rows = [
        {"id": str(n), "document": text, "summary": reference}
        for n, (text, reference) in enumerate(zip(ARTICLES, references, strict=True))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = {"name": "xsum", "path": str(file)}
    judges = {"idf": True}
    first = _evaluate(tiny_model, settings, benchmark, metrics=["rouge_l"])[1]
    # The tiny model says nothing of the kind itself.
    known = [
        one.model_copy(update={"output": said})
        for one, said in zip(first, [TEXTS[1], "A school was closed.", "A mayor opened a library."], strict=True)
    ]
    for size in (1, 3):
        scores, generations = _evaluate(
            tiny_model, settings, benchmark, metrics=["bertscore"], judges=judges, known=known, batch_size=size
        )
        expected = plain_bertscore(minilm, [(one.output, one.reference) for one in generations], references=references)
        assert [one.scores["bertscore"] for one in generations] == pytest.approx(expected, abs=1e-3)
        assert scores["bertscore"].value == pytest.approx(np.mean(expected), abs=1e-3)
    plain, _ = _evaluate(tiny_model, settings, benchmark, metrics=["bertscore"], known=known)
    assert abs(plain["bertscore"].value - scores["bertscore"].value) > 0.1


def test_idf_of_a_single_reference_is_a_reason_not_a_number(
    tiny_model: Path, settings: Settings, benchmark: dict[str, str], tmp_path: Path
) -> None:
    make_encoder(tmp_path / "encoder")
    judges = {"encoder": str(tmp_path / "encoder"), "idf": True}
    scores, _ = _evaluate(tiny_model, settings, benchmark, metrics=["bertscore"], judges=judges)
    assert scores["bertscore"].value is None
    assert "there is only one reference" in str(scores["bertscore"].missing)


def test_an_unknown_metric_is_one_mistake() -> None:
    with pytest.raises(SpecError) as caught:
        parse_evaluation({"metrics": ["rouge"]})
    assert caught.value.what.count(";") == 0
    assert caught.value.what.startswith("metrics.0: 'rouge': Input should be 'rouge_l'")


@pytest.mark.parametrize(
    ("spec", "mistake"),
    [
        ({"metrics": ["self_consistency"]}, "set samples"),
        ({"samples": 3}, "add it to metrics"),
        ({"metrics": ["entailment"]}, "judges.nli"),
        ({"judges": {"idf": True}}, "only serves the metric bertscore"),
        ({"metrics": ["chrf", "chrf"]}, "more than once"),
        ({"metrics": []}, "at least 1"),
    ],
)
def test_a_metric_without_what_it_needs_is_named(spec: dict, mistake: str) -> None:
    with pytest.raises(SpecError, match=mistake):
        parse_evaluation(spec)


def _evaluate(
    model: Path, settings: Settings, benchmark: dict[str, str], *, known: list[Generation] | None = None, **fields
) -> tuple[dict[str, Score], list[Generation]]:
    generations = {one.item_id: one for one in known or []}
    spec = EvaluationSpec.model_validate({"benchmarks": [benchmark], "max_new_tokens": 20, "batch_size": 2, **fields})
    scores = evaluate(
        str(model),
        spec=spec,
        settings=settings,
        known=known or [],
        on_generations=lambda new: generations.update({one.item_id: one for one in new}),
    )
    return {score.metric: score for score in scores}, [generations[key] for key in sorted(generations)]


def _lens(model: Path, tmp_path: Path) -> tuple[Path, Lens]:
    network = load_model(str(model)).model
    layers, heads = network.config.num_hidden_layers, network.config.num_attention_heads
    coefficients = np.random.default_rng(3).normal(size=layers * heads) * 4
    lens = Lens(
        model=str(model),
        fingerprint=fingerprint_model(network),
        layers=layers,
        heads=heads,
        intercept=-float(coefficients.sum()) / 2,
        coef=coefficients.tolist(),
    )
    file = tmp_path / "lens.json"
    file.write_text(lens.model_dump_json())
    return file, lens
