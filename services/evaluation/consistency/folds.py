"""The fold protocol: every labelled output is scored by a network that has seen no document of its group."""

import copy
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold

from services.evaluation.consistency.claims import Claim
from services.evaluation.consistency.held_out import Judgement
from services.evaluation.consistency.labelled import Example
from services.evaluation.consistency.network import ConsistencyNetwork
from services.evaluation.consistency.scoring import ClaimScore, output_score, score_claims
from services.evaluation.consistency.training import LabelledClaim, fit

FOLDS = 5

Report = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a network learns from people's labels: the ``claims`` of ``examples``."""

    examples: Sequence[Example]
    claims: Sequence[LabelledClaim]
    epochs: int
    learning_rate: float
    seed: int


def score_held_out(
    first: ConsistencyNetwork, course: Course, *, folds: int = FOLDS, report: Report = lambda _what, _done, _of: None
) -> list[Judgement]:
    """One judgement for each example, in order, by a network fitted to the claims of all other folds' documents."""
    scores: dict[int, ClaimScore] = {}
    groups = np.array([course.examples[item.example].group for item in course.claims])
    for number, (train, test) in enumerate(split_by_group(groups, folds=folds, seed=course.seed)):
        title = f"fold {number + 1} of {folds}"
        network = fit_copy(first, course, groups=set(groups[train].tolist()), title=title, report=report)
        scored = score_claims(network, [course.claims[index].encoded for index in test])
        scores.update(zip(test, scored, strict=True))
    return _judge(course, scores)


def fit_copy(
    first: ConsistencyNetwork,
    course: Course,
    *,
    groups: set[int],
    title: str,
    report: Report = lambda _what, _done, _of: None,
) -> ConsistencyNetwork:
    """A copy of ``first``, fitted to the labelled claims of the document ``groups`` alone."""
    network = copy.deepcopy(first)
    labelled = [item for item in course.claims if course.examples[item.example].group in groups]
    fit(
        network,
        balance(labelled, course.examples),
        epochs=course.epochs,
        learning_rate=course.learning_rate,
        seed=course.seed,
        progress=functools.partial(report, title),
    )
    return network


def split_by_group(groups: npt.NDArray[np.int64], *, folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Indices to train on and to test, per fold; no group is on both sides, every index is tested once."""
    splitter = GroupKFold(folds, shuffle=True, random_state=seed)
    return [(train.tolist(), test.tolist()) for train, test in splitter.split(groups, groups=groups)]


def balance(claims: Sequence[LabelledClaim], examples: Sequence[Example]) -> list[LabelledClaim]:
    """The claims with a label, weighted so that every set, and supported and unsupported claims in it, weigh the same.

    Otherwise the largest set decides, and in it that nine summaries of ten are wrong.
    """
    known = [item for item in claims if item.label is not None]
    kinds = [(examples[item.example].origin.partition("-")[0], item.label) for item in known]
    counts = Counter(kinds)
    return [
        replace(item, weight=len(known) / (len(counts) * counts[kind])) for item, kind in zip(known, kinds, strict=True)
    ]


def _judge(course: Course, scores: dict[int, ClaimScore]) -> list[Judgement]:
    of_example: dict[int, list[tuple[Claim, ClaimScore]]] = defaultdict(list)
    ranges: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for index, item in enumerate(course.claims):
        claim = item.encoded.claim
        of_example[item.example].append((claim, scores[index]))
        ranges[item.example].extend(
            (claim.start + word.start, claim.start + word.end, round(float(probability), 5))
            for word, probability in zip(claim.words, scores[index].words_W, strict=True)
        )
    return [
        Judgement(key=example.key, score=output_score(of_example[index]), ranges=ranges[index])
        for index, example in enumerate(course.examples)
    ]
