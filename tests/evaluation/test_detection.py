import json
import subprocess
import sys

import pytest

from services.contract.errors import DatasetError, InvalidInputError
from services.contract.settings import Settings
from services.evaluation.detection import DetectorOptions, detect_file

DOCUMENT = "The harbour master of Ostrel said on Tuesday that 14 ferries had been repaired."
OPTIONS = DetectorOptions(model="", lens="", settings=Settings())


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


def test_the_command_says_which_detectors_there_are(tmp_path):
    source = write(tmp_path / "in.jsonl", {"document": DOCUMENT, "summary": "Ferries."})
    with pytest.raises(InvalidInputError, match="no detector"):
        detect_file("magic", source=source, target=tmp_path / "out.jsonl", options=OPTIONS)
    command = [sys.executable, "-m", "services.cli.main", "detect", "--detector", "magic"]
    result = subprocess.run(
        [*command, "--input", str(source), "--output", str(tmp_path / "out.jsonl")], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "lexical, lookback, consistency" in result.stderr
    assert "Traceback" not in result.stderr
