"""Lexical evidence against what can be told by eye."""

import numpy as np
import pytest

from services.evaluation.consistency.claims import FEATURES, Source, read_claims

SOURCE = Source(
    "Anna met Boris in Paris on Monday. She gave him a red book. Clara stayed in Rome with David. It rained in Rome."
)


def feature(output: str, name: str) -> dict[str, float]:
    [claim] = read_claims(output, source=SOURCE)
    column = claim.features_WF[:, FEATURES.index(name)]
    return {word.text: float(value) for word, value in zip(claim.words, column, strict=True)}


def test_a_word_of_another_statement_stands_apart_from_the_rest() -> None:
    apart = feature("Anna met David in Paris.", "apart_from_the_rest")
    assert apart == {"Anna": 0, "met": 0, "David": 1, "in": 0, "Paris": 0}
    apart = feature("Clara stayed in Paris.", "apart_from_the_rest")
    assert apart == {"Clara": 0, "stayed": 0, "in": 0, "Paris": 1}


def test_a_neighbouring_sentence_may_go_on_with_a_statement() -> None:
    told = "Anna gave Boris a book."
    # Alone, the sentence with Anna and Boris lacks the other two words, and the other way round.
    assert feature(told, "apart_from_the_rest") == pytest.approx(
        {"Anna": 0.5, "gave": 0.5, "Boris": 0.5, "a": 0, "book": 0.5}
    )
    assert set(feature(told, "far_from_the_rest").values()) == {0.0}


def test_what_the_source_lacks_stands_apart_and_does_not_move_the_rest() -> None:
    apart = feature("Anna met Boris in Lisbon.", "apart_from_the_rest")
    assert apart == {"Anna": 0, "met": 0, "Boris": 0, "in": 0, "Lisbon": 1}


@pytest.mark.parametrize("output", ["It was.", "Rome"])
def test_a_claim_without_a_rest_has_nothing_apart(output: str) -> None:
    assert set(feature(output, "apart_from_the_rest").values()) == {0.0}


def test_an_empty_source_makes_no_difference_between_words() -> None:
    [claim] = read_claims("Anna met Boris.", source=Source(""))
    assert np.isfinite(claim.features_WF).all()
    assert not claim.features_WF[:, FEATURES.index("apart_from_the_rest")].any()
