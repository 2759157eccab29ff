"""ROUGE-L against its definition."""

import random

import pytest
from nltk.stem.porter import PorterStemmer

from services.evaluation.rouge import rouge_l


def test_it_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    words = [
        "the",
        "ferries",
        "were",
        "repaired",
        "in",
        "ostrel",
        "by",
        "a",
        "harbour",
        "master",
        "and",
        "nobody",
        "complained",
    ]
    generator = random.Random(7)
    for _ in range(20):
        output, reference = (generator.choices(words, k=generator.randint(1, 15)) for _ in range(2))
        assert rouge_l(" ".join(output), reference=" ".join(reference)) == pytest.approx(_by_hand(output, reference))


def test_inflection_and_case_do_not_count() -> None:
    assert rouge_l("Ferries repaired!", reference="ferry repairs") == 100


@pytest.mark.parametrize("output", ["", "...", "東京"])
def test_an_output_without_words_has_zero(output: str) -> None:
    assert rouge_l(output, reference="The ferries were repaired.") == 0


def test_scripts_that_the_package_does_not_read_have_none() -> None:
    """It would find 100 here, for the one thing that it sees is the 15."""
    assert rouge_l("Мэр купил 15 книг.", reference="Девушка потеряла 15 рублей.") is None
    assert rouge_l("The mayor.", reference="市長は水曜日、15隻の船が沈んだと述べた。") is None
    assert rouge_l("Zürich öffnet.", reference="Zürich öffnet.") == 100
    assert rouge_l("15", reference="15, 16") == pytest.approx(100 * 2 / 3)


def _by_hand(output: list[str], reference: list[str]) -> float:
    stemmer = PorterStemmer()
    # The package leaves words of three letters and fewer as they are.
    first, second = ([stemmer.stem(word) if len(word) > 3 else word for word in text] for text in (output, reference))
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, left in enumerate(first, start=1):
        for j, right in enumerate(second, start=1):
            same = left == right
            table[i][j] = table[i - 1][j - 1] + 1 if same else max(table[i - 1][j], table[i][j - 1])
    common = table[-1][-1]
    return 100 * 2 * common / (len(first) + len(second))
