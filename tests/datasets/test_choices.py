"""Files of multiple choice: the hub's own forms pass, and a row that is no question is named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.contract.errors import DatasetError
from services.contract.evaluation_spec import BenchmarkSpec
from services.datasets.choices import check_choices

FIVE = {"question": "Where?", "choices": {"text": [*"vwxyz"], "label": [*"ABCDE"]}, "answerKey": "C"}
# As the hub's viewer shows a row of each, other columns apart.
HUB = {
    "arc_easy": {"id": "1", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    "openbookqa": {"question_stem": "It is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "hellaswag": {"ctx_a": "He", "ctx_b": "", "activity_label": "Run", "endings": [*"abcd"], "label": "3"},
    "commonsense_qa": {"id": "1", **FIVE, "question_concept": "place"},
    "truthfulqa_mc1": {"question": "Why?", "mc1_targets": {"choices": [*"abc"], "labels": [1, 0, 0]}},
    "truthfulqa_mc2": {"question": "Why?", "mc2_targets": {"choices": [*"abc"], "labels": [1, 1, 0]}},
}


@pytest.mark.parametrize("name", HUB)
def test_rows_of_the_hubs_form_are_questions(name: str, tmp_path: Path) -> None:
    _check(name, tmp_path, HUB[name])
    pq.write_table(pa.Table.from_pylist([HUB[name]]), tmp_path / "rows.parquet")
    check_choices(BenchmarkSpec(name=name, path=str(tmp_path / "rows.parquet")))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("arc_easy", {"answerKey": ""}, "line 2: answerKey '' is none of the labels '1', '2'"),
        ("arc_easy", {"answerKey": None}, "line 2: no column 'answerKey'; arc_easy needs"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["1", "2"]}}, "line 2: choices holds no two texts"),
        ("openbookqa", {"choices": ["a", "b"]}, "line 2: choices holds no two texts"),
        ("hellaswag", {"label": ""}, "line 2: label '' is the place of none of the 4 endings"),
        ("hellaswag", {"label": 4}, "line 2: label '4' is the place of none of the 4 endings"),
        ("hellaswag", {"endings": "abcd"}, "line 2: endings holds no two texts"),
        ("commonsense_qa", {"choices": {"text": ["a", "b"], "label": ["A", "B"]}}, "holds 2 texts .* not five"),
        ("truthfulqa_mc1", {"mc1_targets": {"choices": [*"abc"], "labels": [0, 1, 0]}}, "the first has the label 1"),
        ("truthfulqa_mc1", {"mc1_targets": {"choices": [*"abc"], "labels": [1, 1, 0]}}, "the first has the label 1"),
        ("truthfulqa_mc2", {"mc2_targets": {"choices": [*"abc"], "labels": [1, 1, 1]}}, "some have the label 1"),
    ],
)
def test_a_row_that_is_no_question_is_named(name: str, change: dict, why: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=why):
        _check(name, tmp_path, HUB[name], {**HUB[name], **change})


def test_the_real_files_pass(shared_data: Path) -> None:
    files = {
        "arc_easy": "arc_easy/test.jsonl",
        "arc_challenge": "arc_challenge/test.jsonl",
        "openbookqa": "openbookqa/test.jsonl",
        "hellaswag": "hellaswag/validation.jsonl",
        "commonsense_qa": "commonsense_qa/validation.jsonl",
        "truthfulqa_mc1": "truthful_qa/mc1.jsonl",
    }
    for name, file in files.items():
        check_choices(BenchmarkSpec(name=name, path=str(shared_data / file)))


def _check(name: str, folder: Path, *rows: dict) -> None:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    check_choices(BenchmarkSpec(name=name, path=str(file)))
