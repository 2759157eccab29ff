"""NLI cross-encoders on a tiny random one, against one pair at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from services.contract.errors import InvalidInputError, ModelNotFoundError
from services.contract.settings import Settings
from services.evaluation.nli import NliJudge, load_nli
from tests.evaluation.tiny_judges import TEXTS, make_encoder, make_nli

SETTINGS = Settings(offline=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("nli")
    return directory, make_nli(directory)


@pytest.fixture(scope="module")
def judge(published: tuple[Path, Any]) -> NliJudge:
    return load_nli(str(published[0]), settings=SETTINGS)


def test_probabilities_are_those_of_the_entailment_label(judge: NliJudge, published: tuple[Path, Any]) -> None:
    pairs = [(TEXTS[1], TEXTS[3]), ("Rain.", "A"), (TEXTS[2], "Two bridges were closed."), ("", "Ferries.")]
    expected = [_plain(published, *pair) for pair in pairs]
    assert judge.entailed(pairs) == pytest.approx(expected, rel=1e-3)
    assert max(expected) > 1.5 * min(expected)


def test_each_sentence_has_the_best_window_and_the_output_their_mean(
    judge: NliJudge, published: tuple[Path, Any]
) -> None:
    document = " ".join([*TEXTS[1:], *reversed(TEXTS[1:])])
    sentences = ["Two bridges were closed.", "A mayor opened a library."]
    windows = judge._windows(document)
    assert len(windows) > 2
    assert all(window in document for window in windows)
    assert windows[0].startswith("The harbour")
    assert windows[-1].endswith("repaired.")
    # Neighbouring sentences stand together in some window, and no window is cut short by the model.
    supported = [max(_plain(published, window, sentence) for window in windows) for sentence in sentences]
    [verdict] = judge.judge([(document, " ".join(sentences))])
    assert verdict.score == pytest.approx(100 * sum(supported) / 2, abs=1e-3)
    marked = {(span.start, span.end): 1 - span.score for span in verdict.spans}
    places = [(0, len(sentences[0])), (len(sentences[0]) + 1, len(" ".join(sentences)))]
    wrong = {place: score for place, score in zip(places, supported, strict=True) if score < 0.5}
    assert marked == pytest.approx(wrong, abs=1e-5)


def test_nothing_to_judge_and_nothing_to_judge_by(judge: NliJudge) -> None:
    empty, without_source = judge.judge([(TEXTS[1], " \n"), ("", "Ferries sank.")])
    assert (empty.score, list(empty.spans)) == (None, [])
    assert without_source.score == 0
    assert without_source.spans[0].score == 1


def test_a_sentence_over_the_window_does_not_fail(judge: NliJudge) -> None:
    [verdict] = judge.judge([("ferry " * 300, "ferry " * 200)])
    assert verdict.score is not None
    assert 0 <= verdict.score <= 100


def test_a_model_without_entailment_is_refused(tmp_path: Path) -> None:
    make_nli(tmp_path / "mood", labels=("good", "bad"))
    with pytest.raises(InvalidInputError, match="no label of entailment; its labels are good, bad"):
        load_nli(str(tmp_path / "mood"), settings=SETTINGS)
    with pytest.raises(ModelNotFoundError, match="no model hub"):
        load_nli("cross-encoder/nli-deberta-v3-base", settings=SETTINGS)
    make_encoder(tmp_path / "encoder")
    with pytest.raises(InvalidInputError, match="no label of entailment"):
        load_nli(str(tmp_path / "encoder"), settings=SETTINGS)


@torch.inference_mode()
def _plain(published: tuple[Path, Any], premise: str, hypothesis: str) -> float:
    directory, model = published
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(premise, hypothesis, return_tensors="pt", truncation=True, max_length=64)
    return float(model(**batch).logits[0].softmax(-1)[1])
