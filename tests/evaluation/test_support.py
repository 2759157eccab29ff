"""The support check: each kind of addition is found where it stands, and it agrees with people."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from services.evaluation.support import check_support
from services.evaluation.words import STOP_WORDS

ARTICLE = (
    "The harbour master of Ostrel, Imogen Trusk, said on Tuesday that 14 ferries had been repaired for 1,200 crowns "
    "each, 12 per cent of them twice. “No sailing will be cancelled,” the Larch Row Ferry Company told a dozen "
    "reporters. About 186,432 people crossed in May, the third record since 1998."
)


@pytest.mark.parametrize(
    "output",
    [
        "Fourteen ferries were repaired in Ostrel.",
        "Repairs to 14 ferries for 1200 crowns each, said Imogen Trusk, harbour master.",
        "Trusk: 12% were repaired twice.",
        "Twelve reporters were told that sailings would not be cancelled.",
        "Some 186,000 people crossed in May, a 3rd record.",
        "The Larch Row Ferry Company's ferries.",
        "According to the article, the ferries sailed.",
        "IMOGEN TRUSK REPAIRED FERRIES",
    ],
)
def test_what_the_article_says_is_supported_in_any_form(output: str) -> None:
    support = check_support(output, source=ARTICLE)
    assert support.spans == []
    assert support.share == 100
    assert support.checked > 0


@pytest.mark.parametrize(
    ("output", "marked", "kind", "explanation"),
    [
        ("The ferries of Wexlow sail.", "Wexlow", "entity", 'the article has no "Wexlow"; no name there comes near it'),
        (
            "The master is Imogen Trask, they say.",
            "Trask",
            "entity",
            'the article has no "Trask"; the nearest name there is "Trusk"',
        ),
        (
            "It went to the Bank of Merrow on Tuesday.",
            "Bank of Merrow",
            "entity",
            'the article has no "Bank of Merrow"; no name there comes near it',
        ),
        ("There were 15 ferries.", "15", "number", 'the article has no "15"; the nearest it gives: 14, 12, 3'),
        ("There were fifteen ferries.", "fifteen", "number", 'the article has no "fifteen"; the nearest'),
        (
            "14 per cent.",
            "14 per cent",
            "number",
            'the article has no "14 per cent"; the nearest it gives: 12 %',
        ),
        (
            "It was £1.5 million.",
            "£1.5 million",
            "number",
            'the article has no "£1.5 million"; the nearest it gives: 186',
        ),
        ("About 187,000 people crossed.", "187,000", "number", 'the article has no "187,000"'),
        ("The ferries exploded.", "exploded", "word", 'the article has no "exploded", in any form of the word'),
        (
            "The ferries were stolen yesterday.",
            "stolen yesterday",
            "word",
            'the article has none of the words "stolen yesterday", in any form',
        ),
    ],
)
def test_what_was_added_is_marked(output: str, marked: str, kind: str, explanation: str) -> None:
    (span,) = check_support(output, source=ARTICLE).spans
    assert output[span.start : span.end] == marked
    assert (span.kind, span.detector) == (kind, "support")
    assert span.explanation.startswith(explanation)


def test_the_share_weighs_names_and_numbers_double() -> None:
    support = check_support("In Ostrel 14 ferries exploded.", source=ARTICLE)
    # Supported: Ostrel (2), 14 (2), ferries (1). Not: exploded (1).
    assert support.checked == 4
    assert support.share == pytest.approx(100 * 5 / 6)


@pytest.mark.parametrize(("output", "why"), [("", "empty"), (" \n", "empty"), ("It was so.", "no name, number or")])
def test_nothing_to_check_is_no_score(output: str, why: str) -> None:
    support = check_support(output, source=ARTICLE)
    assert support.share is None
    assert support.missing is not None
    assert why in support.missing


def test_offsets_count_characters_of_any_script() -> None:
    output = "🚢🚢 Die Fähre fährt für Ünal; 東京も。"
    spans = check_support(output, source="Die Fähre fährt. 東 🚢").spans
    assert [output[span.start : span.end] for span in spans] == ["für", "Ünal", "京も"]


@given(st.text(max_size=120), st.text(max_size=120))
def test_any_text_can_be_checked(output: str, source: str) -> None:
    support = check_support(output, source=source)
    assert (support.share is None) == (support.checked == 0)
    assert all(0 <= span.start < span.end <= len(output) for span in support.spans)
    itself = check_support(output, source=output)
    assert itself.share in (None, 100)


def test_it_finds_hallucinated_summaries_better_than_counting_novel_words(shared_data: Path) -> None:
    """XSumFaith: a summary is hallucinated where the majority marked a token; DeFacto: where an error was found."""
    documents = {row["bbcid"]: row["document"] for row in _rows(shared_data / "xsum_hallucination" / "documents.jsonl")}
    xsum_faith = [
        (any(row["token_hallucinated"]), row["summary"], documents[row["bbcid"]])
        for row in _rows(shared_data / "xsum_hallucination" / "spans.jsonl")
    ]
    defacto = [
        (row["has_error"], row["candidate"], row["article"]) for row in _rows(shared_data / "defacto" / "xsum.jsonl")
    ]
    assert (len(xsum_faith), len(defacto)) == (810, 250)
    for examples, floor in ((xsum_faith, 0.735), (defacto, 0.69)):
        labels = [label for label, _, _ in examples]
        unsupported = [1 - (check_support(text, source=source).share or 0) / 100 for _, text, source in examples]
        novel = [_novel_words(text, source) for _, text, source in examples]
        auroc = roc_auc_score(labels, unsupported)
        assert auroc > floor
        assert auroc > roc_auc_score(labels, novel) + 0.01


def _novel_words(text: str, source: str) -> float:
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS]
    known = set(re.findall(r"\w+", source.lower()))
    return sum(word not in known for word in words) / max(len(words), 1)


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
