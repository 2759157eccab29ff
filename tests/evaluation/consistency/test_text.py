import os
import subprocess
import sys

from services.evaluation.consistency.text import LONGEST_SENTENCE, read_words, split_sentences, word_key


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


def test_sentences_end_where_a_reader_would_end_them() -> None:
    assert sentences('Mr. Lee left. "Why?" he asked.\nNobody knew') == [
        "Mr. Lee left.",
        '"Why?"',
        "he asked.",
        "Nobody knew",
    ]
    assert sentences("Born in 1.5 hours . Then J. K. Rowling came .") == [
        "Born in 1.5 hours .",
        "Then J. K. Rowling came .",
    ]


def test_text_without_words_has_no_sentences() -> None:
    assert split_sentences("") == []
    assert split_sentences(" \n\t ") == []
    assert split_sentences("... !!! ?\n---") == []


def test_an_endless_sentence_is_read_in_pieces_that_lose_no_word() -> None:
    text = " ".join("ab"[number % 2] * 3 for number in range(3 * LONGEST_SENTENCE + 5))
    pieces = sentences(text)
    assert len(pieces) == 4
    assert " ".join(pieces) == text


def test_words_keep_their_characters() -> None:
    text = "Zoë's café paid £1,200.50 for twelve 'well-known' prints"
    for word in read_words(text):
        assert text[word.start : word.end] == word.text
    assert [word.text for word in read_words(text)][:5] == ["Zoë's", "café", "paid", "1,200.50", "for"]


def test_inflections_and_spellings_share_a_key() -> None:
    assert word_key("visited") == word_key("Visits")
    assert word_key("Twelve") == word_key("12")
    assert word_key("1,200") == word_key("1200")
    assert word_key("John's") == word_key("John")
    assert word_key("1943") != word_key("1946")
    assert word_key("日本") == "日本"


def test_claims_are_the_same_in_every_process() -> None:
    """String hashes, and with them the order of sets, differ between processes."""
    code = (
        "import hashlib;from services.evaluation.consistency.claims import Source, read_claims;"
        "text='The red fox saw the old dog. The old dog saw the red hen. A hen and a fox saw it. ' * 20;"
        "claims=read_claims('The old hen saw a red dog and a fox.', source=Source(text));"
        "print([(c.passage, c.nearest, hashlib.md5(c.features_WF.tobytes()).hexdigest()) for c in claims])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert "fox" in outputs.pop()
