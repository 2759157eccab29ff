"""The fold protocol on tiny data: what is left out has no influence on its own scores."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from services.evaluation.consistency import training
from services.evaluation.consistency.batching import make_batch
from services.evaluation.consistency.encoding import Encoder
from services.evaluation.consistency.folds import Course, balance, score_held_out, split_by_group
from services.evaluation.consistency.held_out import read_held_out, write_held_out
from services.evaluation.consistency.labelled import Example
from services.evaluation.consistency.network import ConsistencyNetwork
from services.evaluation.consistency.training import LabelledClaim, label_claims


@pytest.fixture(scope="module")
def examples(news: list[tuple[str, str]]) -> list[Example]:
    """Each of sixteen articles with its reference, and with the reference of the next one as a wrong summary."""
    made = []
    for group, (article, reference) in enumerate(news[:16]):
        wrong = news[group + 1][1]
        right_one = Example(
            origin="bump",
            key=f"{group}-r",
            document=article,
            output=reference,
            unsupported=False,
            spans=[],
            group=group,
        )
        made += [
            right_one,
            replace(right_one, key=f"{group}-w", output=wrong, unsupported=True, spans=[(0, len(wrong))]),
        ]
    return made


@pytest.fixture(scope="module")
def claims(examples: list[Example], encoder: Encoder) -> list[LabelledClaim]:
    return label_claims(examples, encoder=encoder)


def course(examples: list[Example], claims: list[LabelledClaim]) -> Course:
    return Course(examples=examples, claims=claims, epochs=3, learning_rate=3e-3, seed=1)


@pytest.fixture(scope="module")
def first() -> ConsistencyNetwork:
    torch.manual_seed(0)
    return ConsistencyNetwork(members=2)


def test_no_group_is_on_both_sides_and_each_is_tested_once() -> None:
    groups = np.repeat(np.arange(23), 3)
    tested = []
    for train, test in split_by_group(groups, folds=5, seed=0):
        assert not set(groups[train]) & set(groups[test])
        tested += test
    assert sorted(tested) == list(range(69))


def test_held_out_scores_tell_wrong_from_right_and_repeat(
    first: ConsistencyNetwork, examples: list[Example], claims: list[LabelledClaim]
) -> None:
    long_course = replace(course(examples, claims), epochs=12)
    judgements = score_held_out(first, long_course, folds=2)
    assert [judgement.key for judgement in judgements] == [example.key for example in examples]
    scores = np.array([judgement.score for judgement in judgements], dtype=float)
    assert (scores[1::2] > scores[::2]).mean() >= 0.8
    assert score_held_out(first, long_course, folds=2) == judgements


def test_labels_of_a_document_do_not_reach_its_own_scores(
    first: ConsistencyNetwork, examples: list[Example], claims: list[LabelledClaim]
) -> None:
    before = score_held_out(first, course(examples, claims), folds=2)
    flipped = [
        replace(item, words_W=1 - item.words_W, label=1 - item.label) if examples[item.example].group == 3 else item
        for item in claims
        if item.words_W is not None and item.label is not None
    ]
    after = score_held_out(first, course(examples, flipped), folds=2)
    of_group = [index for index, example in enumerate(examples) if example.group == 3]
    # With balanced flips the weights stay the same, so only a leak could move these scores.
    assert [after[index].score for index in of_group] == [before[index].score for index in of_group]
    assert [judgement.score for judgement in after] != [judgement.score for judgement in before]


def test_members_are_fitted_apart_and_their_logits_averaged(
    first: ConsistencyNetwork, claims: list[LabelledClaim]
) -> None:
    together = copy.deepcopy(first)
    steps = []
    training.fit(
        together, claims, epochs=1, learning_rate=1e-3, seed=5, progress=lambda done, of: steps.append((done, of))
    )
    alone = []
    for number, member in enumerate(first.members):
        one = ConsistencyNetwork(members=1)
        one.members[0].load_state_dict(member.state_dict())
        training.fit(one, claims, epochs=1, learning_rate=1e-3, seed=5 + number)
        alone.append(one.eval())
    batch = make_batch([item.encoded for item in claims[:5]])
    with torch.no_grad():
        words_BW, claims_B = together.eval()(batch)
        words_MBW, claims_MB = zip(*(one(batch) for one in alone), strict=True)
    torch.testing.assert_close(words_BW, torch.stack(words_MBW).mean(0))
    torch.testing.assert_close(claims_B, torch.stack(claims_MB).mean(0))
    assert not torch.allclose(claims_MB[0], claims_MB[1], atol=1e-3)
    assert steps == [(done, steps[-1][0]) for done in range(1, len(steps) + 1)]


def test_sets_and_labels_weigh_the_same(examples: list[Example], claims: list[LabelledClaim]) -> None:
    uneven = [*claims, *claims[:3], replace(claims[0], label=None, words_W=None)]
    balanced = balance(uneven, examples)
    assert len(balanced) == len(uneven) - 1
    weights = {label: sum(item.weight for item in balanced if item.label == label) for label in (0.0, 1.0)}
    assert weights[0.0] == pytest.approx(weights[1.0])
    assert sum(weights.values()) == pytest.approx(len(balanced))


def test_words_that_nobody_judged_do_not_count(examples: list[Example], claims: list[LabelledClaim]) -> None:
    torch.manual_seed(0)
    network = ConsistencyNetwork().eval()
    judged = claims[:4]
    unknown = [replace(item, words_W=None, label=None) for item in claims[4:6]]
    alone = training._loss(network, judged)
    assert training._loss(network, [*judged, *unknown]).item() == pytest.approx(alone.item(), rel=1e-4)


def test_held_out_scores_come_back_from_disk(tmp_path, first, examples, claims) -> None:
    judgements = score_held_out(first, replace(course(examples, claims), epochs=1), folds=2)
    write_held_out(tmp_path, judgements)
    assert read_held_out(tmp_path) == {judgement.key: judgement for judgement in judgements}
    text = (tmp_path / "held_out.json").read_text()
    assert not any(example.output[:20] in text for example in examples)
