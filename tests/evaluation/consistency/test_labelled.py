import random
from pathlib import Path

import pytest

from services.contract.errors import DatasetError
from services.evaluation.consistency.labelled import changed_spans, group_documents, read_labelled
from services.evaluation.consistency.made import make_examples, read_material


def test_changed_spans_are_what_an_edit_put_in() -> None:
    before = "Rosie appeared on the cover on May 29, 1943 ."
    after = "Rosie appeared on the cover on June 14, 1943 ."
    assert [after[start:end] for start, end in changed_spans(before, after)] == ["June 14"]
    assert changed_spans(before, before) == []


def test_a_removal_is_marked_beside_its_gap() -> None:
    after = "He was found guilty on Monday"
    assert [after[start:end] for start, end in changed_spans("He was not found guilty on Monday", after)] == [
        "was found"
    ]


def words(generator: random.Random, count: int) -> str:
    return " ".join("".join(generator.choices("abcdefghij", k=6)) for _ in range(count))


def test_documents_that_share_text_share_a_group() -> None:
    generator = random.Random(0)
    first, other = words(generator, 200), words(generator, 200)
    shortened = words(generator, 5) + " " + first[300:].upper()
    assert group_documents([first, other, shortened, first]) == [0, 1, 0, 0]


def test_labels_of_the_real_sets(shared_data: Path) -> None:
    examples = read_labelled(shared_data)
    by_origin: dict[str, list] = {}
    for example in examples:
        by_origin.setdefault(example.origin, []).append(example)
        for start, end in example.spans or []:
            assert 0 <= start < end <= len(example.output)
    assert {origin: len(found) for origin, found in by_origin.items()} == {
        "xsumfaith": 810,
        "defacto": 250,
        "defacto-corrected": 178,
        "bump": 420,
        "bump-reference": 92,
        "summeval": 400,
    }
    assert sum(example.unsupported for example in by_origin["xsumfaith"]) == 729
    assert all(example.spans for example in by_origin["bump"])
    groups: dict[str, set[int]] = {}
    for example in examples:
        groups.setdefault(example.document, set()).add(example.group)
    assert all(len(found) == 1 for found in groups.values())


def test_made_examples_are_apart_from_labelled_documents(shared_data: Path) -> None:
    examples = read_labelled(shared_data)
    material = read_material(shared_data, apart_from=examples)
    # 18 articles of DeFacto are in the XSum file too.
    assert len(material.articles) <= 332
    labelled = {" ".join(example.document.split())[:150] for example in examples}
    assert not labelled & {" ".join(article.split())[:150] for article in material.articles}
    material = type(material)(answers=material.answers[:40], articles=material.articles[:10])
    made = make_examples(material, seed=3)
    assert made == make_examples(material, seed=3)
    assert made != make_examples(material, seed=4)
    assert {example.unsupported for example in made} == {True, False}
    for example in made:
        if not example.unsupported:
            assert example.output in example.document or example.output in " ".join(
                answer for _, answer in material.answers
            )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"documents\.jsonl"):
        read_labelled(tmp_path)
