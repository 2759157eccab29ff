"""chrF, METEOR and BERTScore against plain computations of their published formulas; answers to questions."""

import math
from collections import Counter
from pathlib import Path

import pytest
from nltk.stem.porter import PorterStemmer

from services.contract.errors import DatasetError
from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.settings import Settings
from services.datasets.questions import load_questions
from services.evaluation.bertscore import BertScore, load_bertscore
from services.evaluation.overlap import chrf, meteor_exact_stem
from services.evaluation.question_answering import answer_f1, exact_match
from tests.evaluation.bertscore_reference import plain_bertscore
from tests.evaluation.tiny_judges import TEXTS, make_encoder

PAIRS = [
    (TEXTS[1], "On Tuesday the harbour master said that 14 ferries were repaired in Ostrel."),
    ("Two bridges were closed.", TEXTS[2]),
    ("A mayor opened a library.", "A mayor opened a library."),
    ("Snow.", TEXTS[3]),
    ("Zürich ꙮ zebra?", "The zebra ꙮ of Zürich, ꙮ."),
]


def test_chrf_is_the_f2_of_character_n_grams() -> None:
    for output, reference in PAIRS:
        assert chrf(output, reference=reference) == pytest.approx(_plain_chrf(output, reference))
    assert chrf("", reference="A text.") == 0


def test_meteor_without_synonyms_by_hand() -> None:
    """Matches, chunks and the formula of Banerjee and Lavie with NLTK's parameters, counted by hand."""
    assert meteor_exact_stem("the ferries were repaired", reference="the ferry was repaired") == pytest.approx(
        _meteor(matches=3, output=4, reference=4, chunks=2)
    )
    assert PorterStemmer().stem("ferries") == PorterStemmer().stem("ferry")
    assert meteor_exact_stem("rain fell", reference="snow lay") == 0
    whole = _meteor(matches=4, output=4, reference=4, chunks=1)
    assert meteor_exact_stem("the ferry was repaired", reference="the ferry was repaired") == pytest.approx(whole)
    assert meteor_exact_stem("", reference="a text") == 0


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("encoder", ["tiny", "minilm"])
def test_bertscore_is_the_authors_formula(
    tmp_path: Path, encoder: str, idf: bool, request: pytest.FixtureRequest
) -> None:
    if encoder == "tiny":
        make_encoder(tmp_path)
    directory: Path = tmp_path if encoder == "tiny" else request.getfixturevalue("minilm")
    bertscore = load_bertscore(str(directory), settings=Settings(offline=True))
    weights = bertscore.idf([reference for _, reference in PAIRS]) if idf else None
    expected = plain_bertscore(directory, PAIRS, references=[reference for _, reference in PAIRS] if idf else None)
    assert bertscore.tokenizer.unk_token_id in bertscore.tokenizer(PAIRS[-1][0])["input_ids"]
    assert bertscore.score(PAIRS, weights=weights) == pytest.approx(expected, abs=1e-3)
    assert bertscore.score([("", "A text."), (" ", "A text.")]) == [None, None]


def test_an_idf_knows_ids_beyond_the_number_of_tokens(tmp_path: Path) -> None:
    """As of a tokenizer with gaps in its ids, where the number of tokens is no bound of them."""
    make_encoder(tmp_path)
    bertscore = load_bertscore(str(tmp_path), settings=Settings(offline=True))

    class Gappy:
        def __init__(self, ids: dict[str, list[int]]) -> None:
            self.ids, self.all_special_ids, self.unk_token_id, self.pad_token_id = ids, [], None, 0

        def __len__(self) -> int:
            return 3

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": self.ids[text]}

    texts = {"a": [1, 20], "b": [20, 7, 7], "c": [20, 30]}
    weights = BertScore(bertscore.model, tokenizer=Gappy(texts), longest=8).idf(["a", "b"])
    assert [weights[id_] for id_ in (1, 7, 20, 30)] == pytest.approx(
        [math.log(3 / 2), math.log(3 / 2), 0.0, math.log(3)]
    )
    vectors = BertScore(bertscore.model, tokenizer=Gappy(texts), longest=8)
    assert vectors.score([("c", "c")], weights=weights) == pytest.approx([100.0], abs=1e-3)


def test_bertscore_runs_on_minilm(minilm: Path, tmp_path: Path) -> None:
    bertscore = load_bertscore(str(minilm), settings=Settings(offline=True))
    near, far, same = bertscore.score(
        [("The ferries were mended.", PAIRS[0][1]), ("Cats purr.", PAIRS[0][1]), (PAIRS[0][1], PAIRS[0][1])]
    )
    assert near is not None
    assert far is not None
    assert far < near < same == pytest.approx(100, abs=1e-3)
    [long] = bertscore.score([("ferry " * 2000, "ferry " * 2000)])
    assert long == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize(
    ("output", "reference", "exact", "f1"),
    [
        ("The Ostrel Ferry.", "ostrel ferry", True, 1.0),
        ("Ostrel\nbecause the paragraph says so", "Ostrel", True, 1.0),
        ("the old Ostrel ferry", "Ostrel ferry line", False, 2 * 2 / 6),
        ("yes, it was", "yes", False, 0.0),
        ("no", "yes", False, 0.0),
        ("", "Ostrel", False, 0.0),
        ("ferry ferry", "ferry", False, 2 / 3),
    ],
)
def test_answers_to_questions(output: str, reference: str, exact: bool, f1: float) -> None:
    assert exact_match(output, reference=reference) is exact
    assert answer_f1(output, reference=reference) == pytest.approx(f1)


def test_hotpotqa_is_read_with_all_its_paragraphs(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "hotpot_qa" / "distractor.jsonl"
    items = load_questions(BenchmarkSpec(name="hotpotqa", path=str(file)), limit=5)
    assert len(items) == 5
    assert items[0].question == "VIVA Media AG changed it's name in 2004. What does their new acronym stand for?"
    assert items[0].reference == "Gesellschaft mit beschränkter Haftung"
    assert len(items[0].source.splitlines()) == 10
    assert items[0].source.startswith("Constantin Medien: Constantin Medien AG (formerly")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "1", "question": "Who?", "answer": "", "context": {"title": ["A"], "sentences": []}}\n')
    with pytest.raises(DatasetError, match=r"line 1: nothing usable under answer, context"):
        load_questions(BenchmarkSpec(name="hotpotqa", path=str(broken)))


def _plain_chrf(output: str, reference: str) -> float:
    precisions, recalls = [], []
    texts = ["".join(text.split()) for text in (output, reference)]
    for order in range(1, 7):
        given, right = (Counter(text[at : at + order] for at in range(len(text) - order + 1)) for text in texts)
        if not given or not right:
            continue
        shared = sum((given & right).values())
        precisions.append(shared / sum(given.values()))
        recalls.append(shared / sum(right.values()))
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def _meteor(*, matches: int, output: int, reference: int, chunks: int) -> float:
    precision, recall = matches / output, matches / reference
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return 100 * mean * (1 - 0.5 * (chunks / matches) ** 3)
