import random

import pytest

from services.evaluation.consistency.contradictions import CORRUPTIONS, corrupt

DOCUMENT = (
    "Last week Anna Berg told Peter Holm in Oslo that the council had accepted 12 plans on Monday. "
    "The mayor, Carla Diaz, was not convinced. In 1998 the harbour opened before the war in Bergen."
)
SENTENCE = "Yesterday Anna Berg told Peter Holm that the council had accepted 12 plans in Oslo on Monday."
FOREIGN = "Shares of Norvik Steel dropped sharply after a strike at its mines in Chile during the winter."


@pytest.mark.parametrize("seed", range(40))
def test_a_corruption_changes_exactly_what_it_marks(seed: int) -> None:
    corrupted = corrupt(SENTENCE, document=DOCUMENT, foreign=FOREIGN, generator=random.Random(seed))
    assert corrupted is not None
    assert corrupted.sentence != SENTENCE
    [(start, end)] = corrupted.spans
    assert SENTENCE.startswith(corrupted.sentence[:start])
    assert SENTENCE.endswith(corrupted.sentence[end:])


def test_every_kind_occurs() -> None:
    kinds = {
        corrupted.kind
        for seed in range(300)
        if (corrupted := corrupt(SENTENCE, document=DOCUMENT, foreign=FOREIGN, generator=random.Random(seed)))
    }
    assert kinds == set(CORRUPTIONS)


def test_names_and_numbers_come_from_where_they_should() -> None:
    swapped = CORRUPTIONS["swapped name"](SENTENCE, DOCUMENT, FOREIGN, random.Random(1))
    foreign = CORRUPTIONS["foreign name"](SENTENCE, DOCUMENT, FOREIGN, random.Random(1))
    assert swapped is not None
    assert foreign is not None
    assert swapped[2] in DOCUMENT
    assert foreign[2] in FOREIGN
    assert foreign[2] not in DOCUMENT
    day = CORRUPTIONS["date"](SENTENCE, DOCUMENT, FOREIGN, random.Random(1))
    assert day is not None
    assert SENTENCE[day[0] : day[1]] == "Monday"
    assert day[2].endswith("day")
    assert day[2] != "Monday"


def test_nothing_fits_a_sentence_without_substance() -> None:
    assert corrupt("so it goes", document="so it goes", foreign="and then", generator=random.Random(0)) is None


def test_a_negation_is_put_in_and_taken_out() -> None:
    negate = CORRUPTIONS["negation"]
    assert negate("He was found", "", "", random.Random(0)) == (3, 6, "was not")
    assert negate("He was not found", "", "", random.Random(0)) == (3, 10, "was")
