"""Words and numbers of a text: their values, their offsets, and where sentences begin."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.evaluation.reading import read_tokens


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,200 and 1\u202f200 and 1200", [1200, 1200, 1200]),
        ("twelve, twenty-five, two hundred and six", [12, 25, 206]),
        ("one thousand two hundred people", [1200]),
        ("£1.5million, 1.5m, 1.5 million, $3bn", [1_500_000, 1_500_000, 1_500_000, 3_000_000_000]),
        ("two dozen of a dozen", [24, 12]),
        ("the 3rd, the third, the twenty-first", [3, 3, 21]),
        ("at 11:00 or 11.30, 4am", [11, Decimal("11.3"), 4]),
        ("won 31-22 in the 1990s", [31, 22, 1990]),
        ("seven and two", [7, 2]),
        ("one of them, none, someone", []),
        ("COVID-19 on an A320", [19]),
        ("a 20-year-old", [20]),
        ("٣ and ३", [3, 3]),
    ],
)
def test_values_of_numbers(text: str, values: list[float]) -> None:
    assert [token.value for token in read_tokens(text) if token.value is not None] == values


@pytest.mark.parametrize("text", ["12%", "12 %", "12 per cent", "12 percent", "twelve per cent", "twelve percent"])
def test_percentages_are_one_token(text: str) -> None:
    (token,) = read_tokens(text)
    assert (token.value, token.percent, token.start, token.end) == (12, True, 0, len(text))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("repaired", "repairs"),
        ("Council's", "councils"),
        ("O’Halloran", "O'Halloran"),
        ("caf\u00e9", "cafe\u0301"),
        ("WON", "winner"),
        ("children", "child"),
        ("U.S.", "US"),
        ("straße", "STRASSE"),
    ],
)
def test_forms_of_one_word_share_a_key(one: str, other: str) -> None:
    (first,), (second,) = read_tokens(one), read_tokens(other)
    assert first.key == second.key
    assert (first.start, first.end) == (0, len(one))


def test_names_that_look_like_stop_words_are_told_apart() -> None:
    keys = [token.key for token in read_tokens("They told us in May that US troops may go.")]
    assert keys[2] == "us"
    assert keys[4] == "May"
    assert keys[6] == "US"
    assert keys[8] == "may"


def test_where_sentences_begin() -> None:
    text = "Dr. Ada Quill spoke. Then J. Marsh left! “Why?” Nobody said."
    begins = [token.text for token in read_tokens(text) if token.starts_sentence]
    assert begins == ["Dr", "Then", "Why", "Nobody"]


@given(st.text(max_size=200))
def test_tokens_of_any_text_lie_in_order_at_their_offsets(text: str) -> None:
    end = 0
    for token in read_tokens(text):
        assert end <= token.start < token.end <= len(text)
        assert text[token.start : token.end] == token.text
        end = token.end


def test_a_long_degenerate_output_is_read_in_a_moment() -> None:
    assert len(read_tokens("a" * 50_000 + " the" * 20_000 + " 1" * 20_000 + " twenty" * 20_000)) == 60_001
