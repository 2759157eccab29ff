import json
import re
import subprocess
import sys

import pytest

from services.contract.errors import DatasetError, InvalidInputError, ModelNotFoundError
from services.contract.settings import Settings
from services.evaluation.detection import DetectorOptions, detect_file
from services.evaluation.hhem import load_hhem
from services.evaluation.nli import load_nli
from tests.evaluation.tiny_judges import make_hhem, make_nli

DOCUMENT = "The harbour master of Ostrel said on Tuesday that 14 ferries had been repaired."
OPTIONS = DetectorOptions(settings=Settings())


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_keep_their_fields_and_gain_score_and_spans(tmp_path):
    summary = "Fifteen ferries were repaired in Ostrel."
    rows = [
        {"document": DOCUMENT, "summary": summary, "note": "kept"},
        {"document": DOCUMENT, "summary": "14 ferries were repaired."},
        {"document": DOCUMENT, "summary": ""},
    ]
    target = tmp_path / "out.jsonl"
    without = detect_file("lexical", source=write(tmp_path / "in.jsonl", *rows), target=target, options=OPTIONS)
    wrong, right, empty = [json.loads(line) for line in target.read_text().splitlines()]
    assert without == 1
    assert wrong["note"] == "kept"
    (span,) = wrong["spans"]
    assert summary[span["start"] : span["end"]] == "Fifteen"
    assert span["reason"]
    assert 0 < wrong["score"] <= 1
    assert (right["score"], right["spans"]) == (0, [])
    assert empty["score"] is None
    assert "empty" in empty["missing"]


def test_a_broken_line_is_named_and_nothing_is_written(tmp_path):
    source = write(tmp_path / "in.jsonl", {"document": DOCUMENT, "summary": "Ferries."}, {"document": DOCUMENT})
    target = tmp_path / "out.jsonl"
    with pytest.raises(DatasetError, match=r"in\.jsonl.*2.*'summary'"):
        detect_file("lexical", source=source, target=target, options=OPTIONS)
    source.write_text(source.read_text() + "{broken\n")
    with pytest.raises(DatasetError):
        detect_file("lexical", source=source, target=target, options=OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_nothing_to_judge_is_said(content, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    with pytest.raises(DatasetError, match=r"in\.jsonl holds nothing to judge"):
        detect_file("lexical", source=source, target=tmp_path / "new" / "out.jsonl", options=OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("target", ["file/out.jsonl", "folder"])
def test_an_output_that_cannot_be_written_is_told_before_anything_is_computed(target, tmp_path):
    source = write(tmp_path / "in.jsonl", {"document": DOCUMENT, "summary": "Ferries."})
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInputError, match=f"{target} cannot be written: (File exists|Is a directory)"):
        # There is no such model, which is not what is told.
        detect_file("nli", source=source, target=tmp_path / target, options=OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "in.jsonl"]


def test_the_command_says_which_detectors_there_are(tmp_path):
    source = write(tmp_path / "in.jsonl", {"document": DOCUMENT, "summary": "Ferries."})
    with pytest.raises(InvalidInputError, match="no detector"):
        detect_file("magic", source=source, target=tmp_path / "out.jsonl", options=OPTIONS)
    command = [sys.executable, "-m", "services.cli.main", "detect", "--detector", "magic"]
    result = subprocess.run(
        [*command, "--input", str(source), "--output", str(tmp_path / "out.jsonl")], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "lexical, lookback, consistency, hhem, nli" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lexical", {"model": "m"}, "lexical reads no model.*lookback or hhem or nli"),
        ("consistency", {"lens": "smollm2-135m-instruct"}, "consistency reads no lens.*choose lookback"),
        ("nli", {"model": "m", "lens": "l"}, "nli reads no lens"),
    ],
)
def test_options_that_a_detector_does_not_read_are_refused(name, options, message, tmp_path):
    source = write(tmp_path / "in.jsonl", {"document": DOCUMENT, "summary": "Ferries."})
    with pytest.raises(InvalidInputError) as raised:
        detect_file(
            name, source=source, target=tmp_path / "out.jsonl", options=DetectorOptions(settings=Settings(), **options)
        )
    assert re.search(message, f"{raised.value.what} {raised.value.fix}")


def test_the_inputs_own_fields_are_kept_under_another_name(tmp_path):
    row = {"document": DOCUMENT, "summary": "Ferries.", "score": 0.25, "spans": [{"start": 0, "end": 7}]}
    target = tmp_path / "out.jsonl"
    detect_file("lexical", source=write(tmp_path / "in.jsonl", row), target=target, options=OPTIONS)
    line = json.loads(target.read_text())
    assert (line["input_score"], line["input_spans"]) == (0.25, [{"start": 0, "end": 7}])
    assert (line["score"], line["spans"]) == (0, [])
    twice = write(tmp_path / "twice.jsonl", {**row, "input_score": 1})
    with pytest.raises(DatasetError, match="'score' and 'input_score'"):
        detect_file("lexical", source=twice, target=target, options=OPTIONS)


@pytest.mark.parametrize("name", ["hhem", "nli"])
def test_judges_of_sentences_score_and_mark(name, tmp_path):
    make = {"hhem": make_hhem, "nli": make_nli}[name]
    make(tmp_path / "judge")
    rows = [{"document": DOCUMENT, "summary": f"Ferries {n}. They sank."} for n in range(17)]
    rows += [{"document": DOCUMENT, "summary": ""}]
    options = DetectorOptions(model=str(tmp_path / "judge"), settings=Settings(offline=True))
    seen = []
    without = detect_file(
        name,
        source=write(tmp_path / "in.jsonl", *rows),
        target=tmp_path / "out.jsonl",
        options=options,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert without == 1
    assert seen == [(16, 18), (18, 18)]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    pairs = [(row["document"], row["summary"]) for row in rows]
    load = {"hhem": load_hhem, "nli": load_nli}[name]
    verdicts = load(options.model, settings=options.settings).judge(pairs)
    for line, verdict in zip(lines[:-1], verdicts, strict=False):
        assert line["score"] == pytest.approx(1 - verdict.score / 100, abs=1e-5)
        assert [(span["start"], span["end"]) for span in line["spans"]] == [(s.start, s.end) for s in verdict.spans]
    assert (lines[-1]["score"], lines[-1]["missing"]) == (None, "no word to judge")


def test_nli_without_a_model_and_hhem_without_a_hub_say_what_to_do(tmp_path):
    source = write(tmp_path / "in.jsonl", {"document": DOCUMENT, "summary": "Ferries."})
    options = DetectorOptions(settings=Settings(offline=True))
    with pytest.raises(InvalidInputError, match="needs a cross-encoder"):
        detect_file("nli", source=source, target=tmp_path / "out.jsonl", options=options)
    with pytest.raises(ModelNotFoundError, match="no model hub can be reached") as caught:
        detect_file("hhem", source=source, target=tmp_path / "out.jsonl", options=options)
    assert "vectara/hallucination_evaluation_model" in caught.value.fix
    assert "SmolLM2" not in caught.value.fix
    assert not (tmp_path / "out.jsonl").exists()
