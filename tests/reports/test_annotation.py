"""Words and spans, Krippendorff's alpha against its definition by pairs, and labels that a lens reads."""

from datetime import UTC, datetime
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contract.annotation_records import Annotation, MarkedSpan
from services.evaluation.lookback.labels import read_labels
from services.reports.annotation import (
    JudgedOutput,
    annotator_agreement,
    lens_labels,
    spans_of_words,
    touched_words,
    words_of,
)


def judged(output: str, marks: dict[str, list[tuple[int, int]]], *, source: str = "the source") -> JudgedOutput:
    annotations = [
        Annotation(
            run_id="r",
            benchmark="b",
            item_id="i",
            annotator=annotator,
            spans=[MarkedSpan(start=start, end=end) for start, end in spans],
            written_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
        for annotator, spans in marks.items()
    ]
    return JudgedOutput(source=source, output=output, annotations=annotations)


def alpha_by_pairs(units: list[list[int]]) -> float:
    """1 - observed / expected disagreement, from all pairs of values within a unit and within everything."""
    units = [unit for unit in units if len(unit) > 1]
    total = sum(len(unit) for unit in units)
    observed = sum(sum(a != b for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units) / total
    values = [value for unit in units for value in unit]
    expected = sum(a != b for a, b in permutations(values, 2)) / (total * (total - 1))
    return 1 - observed / expected


def test_alpha_is_that_of_its_definition() -> None:
    random = np.random.default_rng(1)
    words = " ".join(f"w{place:03d}" for place in range(30))  # every word is 5 characters with its space
    outputs, units = [], []
    for people in (("a", "b", "c"), ("a", "c"), ("b",), ("a", "b")):
        truth = random.random(30) < 0.3
        marks, columns = {}, []
        for person in people:
            marked = truth ^ (random.random(30) < 0.15)
            marks[person] = [(5 * place, 5 * place + 2) for place in np.flatnonzero(marked)]
            columns.append(marked.astype(int))
        outputs.append(judged(words, marks))
        units += [list(values) for values in zip(*columns, strict=True)]
    found = annotator_agreement(outputs)
    assert found.alpha == pytest.approx(alpha_by_pairs(units))
    assert (found.outputs, found.shared, found.words) == (4, 3, 90)
    assert found.annotators == {"a": 3, "b": 3, "c": 2}


def test_agreement_that_is_perfect_or_not_defined() -> None:
    assert annotator_agreement([judged("one two", {"a": [(0, 3)], "b": [(1, 2)]})]).alpha == 1.0
    alone = annotator_agreement([judged("one two", {"a": [(0, 3)]})])
    assert (alone.alpha, alone.missing) == (None, "no output has been judged by two people")
    same = annotator_agreement([judged("one two", {"a": [], "b": []})])
    assert same.alpha is None
    assert "same mark from everybody" in str(same.missing)


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.sets(st.integers(-2, 30)))
def test_words_to_spans_and_back(text: str, places: set[int]) -> None:
    words = words_of(text)
    assert [text[start:end] for start, end in words] == text.split()
    spans = spans_of_words(words, places)
    assert touched_words(words, ((span.start, span.end) for span in spans)) == sorted(
        place for place in places if 0 <= place < len(words)
    )
    assert all(one.end < other.start for one, other in pairwise(spans))


def test_labels_are_the_majoritys_and_a_lens_reads_them(tmp_path: Path) -> None:
    outputs = [
        judged("0123456789", {"a": [(0, 4)], "b": [(2, 6)], "c": [(3, 10)]}),
        judged("two people", {"a": [(0, 5)], "b": [(3, 10)]}, source="second\nsource"),
        judged("nothing wrong", {"a": []}),
        judged("  ", {"a": []}),
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text(lens_labels(outputs), encoding="utf-8")
    found = read_labels(file)
    # Of three people two or more marked 2-5; of two both marked 3-4.
    assert [(one.summary, one.spans, one.labelled) for one in found] == [
        ("0123456789", ((2, 6),), True),
        ("two people", ((3, 5),), True),
        ("nothing wrong", (), True),
    ]
    assert found[1].document == "second\nsource"
    assert lens_labels([judged("0123", {"a": [(0, 1), (2, 4)]})]).count('"start"') == 2
