"""HHEM on a tiny random model in the published layout, against transformers' own token classification."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import T5ForTokenClassification

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.evaluation import hhem as hhem_module
from services.evaluation.detection import DetectorOptions, detect_file
from services.evaluation.hhem import load_hhem
from tests.evaluation.tiny_judges import TEXTS, make_hhem

SETTINGS = Settings(offline=True)


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, T5ForTokenClassification]:
    directory = tmp_path / "hhem"
    return directory, make_hhem(directory)


def test_scores_are_the_softmax_of_class_one_at_the_first_position(published: tuple[Path, T5ForTokenClassification]):
    directory, model = published
    pairs = [(TEXTS[1], TEXTS[2]), (TEXTS[2], TEXTS[1]), (TEXTS[3] * 40, TEXTS[1]), ("", "Ferries."), (TEXTS[3], "A")]
    scores = load_hhem(str(directory), settings=SETTINGS).score(pairs)
    expected = [_plain(directory, model, premise, hypothesis) for premise, hypothesis in pairs]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)


def test_long_articles_are_read_to_their_end(published: tuple[Path, T5ForTokenClassification]) -> None:
    directory, _ = published
    hhem = load_hhem(str(directory), settings=SETTINGS)
    long, other = TEXTS[1] * 60, TEXTS[1] * 60 + TEXTS[3]
    assert len(hhem.tokenizer.encode(long).ids) > 512
    assert hhem.score([(long, "Ferries.")]) != pytest.approx(hhem.score([(other, "Ferries.")]), abs=1e-6)


def test_what_would_not_fit_into_memory_has_no_score(
    published: tuple[Path, T5ForTokenClassification], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, model = published
    hhem = load_hhem(str(directory), settings=SETTINGS)
    pairs = [(TEXTS[1] * 60, "Ferries."), (TEXTS[1], "Ferries."), (TEXTS[1], "Ferries. " * 200)]
    longest = len(hhem.tokenizer.encode(hhem_module.PROMPT.format(premise=TEXTS[1], hypothesis="Ferries.")).ids)
    monkeypatch.setattr(hhem_module, "LONGEST", longest)
    expected = _plain(directory, model, *pairs[1])
    assert hhem.score(pairs) == [None, pytest.approx(expected, abs=1e-5), None]
    first, second, third = hhem.judge(pairs)
    assert second.score == pytest.approx(100 * expected, abs=1e-3)
    assert (first.score, third.score) == (None, None)
    assert f"more than the {longest} tokens" in str(first.missing)
    file = directory.parent / "in.jsonl"
    file.write_text("".join(json.dumps({"document": one, "summary": other}) + "\n" for one, other in pairs))
    options = DetectorOptions(model=str(directory), settings=SETTINGS)
    assert detect_file("hhem", source=file, target=directory.parent / "out.jsonl", options=options) == 2
    lines = [json.loads(line) for line in (directory.parent / "out.jsonl").read_text().splitlines()]
    assert [line.get("missing") for line in lines] == [first.missing, None, third.missing]


def test_sentences_that_are_inconsistent_become_spans(published: tuple[Path, T5ForTokenClassification]) -> None:
    directory, model = published
    outputs = [TEXTS[2], "Rain fell on the valley.", "", "..."]
    verdicts = load_hhem(str(directory), settings=SETTINGS).judge([(TEXTS[1], output) for output in outputs])
    assert [verdict.score for verdict in verdicts[2:]] == [None, None]
    for output, verdict in zip(outputs[:2], verdicts, strict=False):
        assert verdict.score == pytest.approx(100 * _plain(directory, model, TEXTS[1], output), abs=1e-3)
        parts = [part if part.endswith(".") else f"{part}." for part in output.split(". ")]
        wrong = {part: score for part in parts if (score := _plain(directory, model, TEXTS[1], part)) < 0.5}
        marked = {output[span.start : span.end]: 1 - span.score for span in verdict.spans}
        assert marked == pytest.approx(wrong, abs=1e-4)
        assert {span.detector for span in verdict.spans} <= {"hhem"}


def test_files_of_newer_libraries_load_as_well(published: tuple[Path, T5ForTokenClassification]) -> None:
    directory, _ = published
    before = load_hhem(str(directory), settings=SETTINGS).score([(TEXTS[1], TEXTS[2])])
    newer = directory.parent / "newer"
    newer.mkdir()
    for file in directory.glob("*.json"):
        (newer / file.name).write_bytes(file.read_bytes())
    description = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps({**description, "foundation": str(directory / "foundation")}))
    state = load_file(directory / "model.safetensors")
    state["t5.transformer.encoder.embed_tokens.weight"] = state["t5.transformer.shared.weight"].clone()
    save_file(state, newer / "model.safetensors")
    assert load_hhem(str(newer), settings=SETTINGS).score([(TEXTS[1], TEXTS[2])]) == before


def test_what_cannot_be_had_is_named(published: tuple[Path, T5ForTokenClassification], tmp_path: Path) -> None:
    directory, _ = published
    with pytest.raises(ModelNotFoundError, match="no model hub can be reached"):
        load_hhem("vectara/hallucination_evaluation_model", settings=SETTINGS)
    with pytest.raises(ModelNotFoundError, match="is not HHEM"):
        load_hhem(str(tmp_path), settings=SETTINGS)
    state = load_file(directory / "model.safetensors")
    state.pop("t5.classifier.weight")
    save_file(state, directory / "model.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"are not HHEM's.*classifier|is not HHEM.*classifier"):
        load_hhem(str(directory), settings=SETTINGS)


@torch.inference_mode()
def _plain(directory: Path, model: T5ForTokenClassification, premise: str, hypothesis: str) -> float:
    """One pair alone, as the model card shows it."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    question = "<pad> Determine if the hypothesis is true given the premise?"
    text = f"{question}\n\nPremise: {premise}\n\nHypothesis: {hypothesis}"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    return float(model(input_ids=torch.tensor([ids])).logits[0, 0].softmax(-1)[1])
