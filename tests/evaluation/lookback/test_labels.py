"""Labelled summaries: JSON lines, XSumFaith, and rows that cannot be used."""

import json
from pathlib import Path

import pytest

from services.contract.errors import DatasetError
from services.evaluation.lookback.labels import LabelledSummary, overlaps, read_labels, words_of


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [
        {"document": "A\u2028b.", "summary": "A c.", "spans": [{"start": 2, "end": 3, "type": "extrinsic"}]},
        {"document": "A b.", "summary": "A b.", "spans": []},
        {"document": "A b.", "summary": "Who knows?", "id": 7},
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_labels(path) == [
        LabelledSummary(document="A\u2028b.", summary="A c.", spans=((2, 3),)),
        LabelledSummary(document="A b.", summary="A b."),
        LabelledSummary(document="A b.", summary="Who knows?", labelled=False),
    ]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{", "line 2: is not JSON"),
        ("[]", "line 2: holds list, not an object"),
        (r'{"document": "A \ud83d", "summary": "A"}', "line 2: holds '.ud83d', half of a character"),
        ('{"document": "A", "summary": " "}', "line 2 has no text in 'summary'"),
        ('{"summary": "A"}', "line 2 has no text in 'document'"),
        ('{"document": "A", "summary": "A", "spans": 3}', "line 2: spans is not a list"),
        (
            '{"document": "A", "summary": "A", "spans": [{"start": 0, "end": 2}]}',
            "of the summary's 1 characters",
        ),
        ('{"document": "A", "summary": "A", "spans": [{"start": -1, "end": 1}]}', "no span of the summary"),
        ('{"document": "A", "summary": "A", "spans": [7]}', "7 is no span"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, row: str, what: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"document": "A", "summary": "A", "spans": []}\n' + row)
    with pytest.raises(DatasetError, match=what):
        read_labels(path)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        read_labels(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match="holds no record"):
        read_labels(tmp_path / "empty.jsonl")


def test_a_folder_of_another_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text('{"bbcid": "1", "document": "A"}\n')
    (tmp_path / "spans.jsonl").write_text('{"bbcid": "1", "summary": "A", "spans": []}\n')
    with pytest.raises(DatasetError, match=r"spans\.jsonl line 1: nothing usable under token_hallucinated"):
        read_labels(tmp_path)
    (tmp_path / "documents.jsonl").write_text('{"id": "1", "document": "A"}\n')
    with pytest.raises(DatasetError, match=r"documents\.jsonl line 1: nothing usable under bbcid"):
        read_labels(tmp_path)


def test_xsumfaith_labels_each_word_as_its_annotators_did(shared_data: Path) -> None:
    folder = shared_data / "xsum_hallucination"
    summaries = read_labels(folder)
    rows = [json.loads(line) for line in (folder / "spans.jsonl").read_text().splitlines()]
    assert len(summaries) == 810
    assert len({item.document for item in summaries}) == 162
    for item, row in zip(summaries, rows, strict=True):
        words = words_of(item.summary)
        assert [item.summary[start:end] for start, end in words] == row["tokens"]
        assert [overlaps(word, item.spans) for word in words] == [bool(flag) for flag in row["token_hallucinated"]]
