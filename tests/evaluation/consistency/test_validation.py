"""The measures against plain computations on labels small enough to see through."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.contract.records import Span
from services.evaluation import validation
from services.evaluation.consistency.held_out import Judgement
from services.evaluation.consistency.labelled import Example, read_labelled
from services.evaluation.judges import judge_by, judge_novel_words, judge_support
from services.evaluation.validation import MEASURES, render_table, validate
from services.evaluation.verdict import Verdict

SUMMARY = "the red fox ran"
UNITS = [(0, 3), (4, 7), (8, 11), (12, 15)]


def example(number: int, *, wrong: list[int]) -> Example:
    return Example(
        origin="xsumfaith",
        key=str(number),
        document="a red fox",
        output=SUMMARY,
        unsupported=bool(wrong),
        spans=[UNITS[index] for index in wrong],
        units=UNITS,
        group=number,
    )


def judgement(number: int, score: float | None, *scores: float) -> Judgement:
    ranges = [(start, end, value) for (start, end), value in zip(UNITS, scores, strict=False)]
    return Judgement(key=str(number), score=score, ranges=ranges)


def test_words_and_summaries_by_hand() -> None:
    examples = [example(0, wrong=[3]), example(1, wrong=[]), example(2, wrong=[0, 1])]
    judgements = [
        judgement(0, 0.9, 0.1, 0.2, 0.3, 0.8),
        judgement(1, 0.5, 0.1, 0.1, 0.1, 0.4),
        judgement(2, 0.4, 0.7, 0.0, 0.1, 0.1),
    ]
    measured = validate(examples, {"by hand": lambda _: judgements})["by hand"]
    # Of 3 wrong and 9 right words: 0.8 and 0.7 beat all nine, 0.0 none.
    assert measured["XSumFaith words"].value == pytest.approx(18 / 27)
    # Of 2 wrong summaries against the right one: 0.9 wins, 0.4 loses.
    assert measured["XSumFaith summaries"].value == pytest.approx(1 / 2)
    assert measured["DeFacto"].value is None
    assert measured["DeFacto"].missing == "no output was scored"


def test_unscored_outputs_are_counted_and_never_averaged() -> None:
    examples = [example(0, wrong=[3]), example(1, wrong=[]), example(2, wrong=[1]), example(3, wrong=[])]
    judgements = [judgement(0, 0.9), judgement(1, 0.1), judgement(2, None)]
    measured = validate(examples, {"some": lambda _: judgements})["some"]["XSumFaith summaries"]
    assert measured.value == 1.0
    assert measured.skipped == 2
    assert ", 2 unscored)" in render_table({"some": dict.fromkeys(MEASURES, measured)}, command="x")


def test_pairs_are_won_lost_or_tied() -> None:
    reference = replace(example(0, wrong=[]), origin="bump-reference", units=None)
    edits = [replace(example(number, wrong=[0]), origin="bump", units=None, group=0) for number in (1, 2, 3, 4)]
    scores = [0.5, 0.9, 0.5, 0.1, 0.6]
    judgements = [judgement(number, score) for number, score in enumerate(scores)]
    measured = validate([reference, *edits], {"pairs": lambda _: judgements})["pairs"]
    assert measured["BUMP pairs won"].value == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_ratings_rank_the_other_way_round() -> None:
    rated = [
        replace(example(number, wrong=[]), origin="summeval", unsupported=None, spans=None, units=None, rating=rating)
        for number, rating in enumerate([5.0, 4.0, 2.0, 1.0])
    ]
    judgements = [judgement(number, score) for number, score in enumerate([0.1, 0.2, 0.3, 0.9])]
    measured = validate(rated, {"opposite": lambda _: judgements})["opposite"]["SummEval rank correlation"]
    assert measured.value == pytest.approx(1.0)


def test_the_baseline_reaches_what_is_known_of_it(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "RESAMPLES", 100)
    examples = [example for example in read_labelled(shared_data) if example.origin in ("xsumfaith", "defacto")]
    results = validate(examples, {"novel words": judge_novel_words, "support": judge_support})
    words = results["novel words"]["XSumFaith words"]
    summaries = results["novel words"]["XSumFaith summaries"]
    assert words.value == pytest.approx(0.63, abs=0.015)
    assert summaries.value == pytest.approx(0.73, abs=0.015)
    for measured in (words, summaries, results["support"]["DeFacto"]):
        assert measured.value is not None
        assert measured.low < measured.value < measured.high
        assert measured.high - measured.low < 0.2


def test_a_judge_of_sentences_is_measured_by_its_scores_and_spans() -> None:
    span = Span(start=8, end=15, detector="nli", kind="sentence", score=0.75, explanation="not entailed")
    verdicts = [Verdict(score=30.0, spans=[span]), Verdict(score=None)]
    pairs = []

    def judge(asked: list[tuple[str, str]]) -> list[Verdict]:
        pairs.extend(asked)
        return verdicts

    judged = judge_by([example(0, wrong=[3]), example(1, wrong=[])], judge)
    assert pairs == [("a red fox", SUMMARY)] * 2
    assert judged == [
        Judgement(key="0", score=0.7, ranges=[(8, 15, 0.75)]),
        Judgement(key="1", score=None, ranges=[]),
    ]
