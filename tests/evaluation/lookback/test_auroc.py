"""AUROC against scikit-learn, and intervals that know that items of a document belong together."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from services.evaluation.lookback.auroc import measure_auroc


def test_auroc_equals_scikit_learn_with_ties() -> None:
    random = np.random.default_rng(0)
    labels = random.random(500) < 0.3
    scores = np.round(random.random(500) + 0.3 * labels, 1)
    auroc = measure_auroc(labels.tolist(), scores.tolist(), groups=list(range(500)))
    assert auroc.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert (auroc.items, auroc.positives) == (500, labels.sum())
    # Hanley and McNeil's standard error for this size is about 0.024.
    assert auroc.low == pytest.approx(auroc.value - 0.047, abs=0.012)
    assert auroc.high == pytest.approx(auroc.value + 0.047, abs=0.012)


def test_items_of_one_document_widen_the_interval() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(random.random(40) < 0.5, 25)
    scores = np.repeat(random.random(40), 25) + 0.3 * labels
    alone = measure_auroc(labels.tolist(), scores.tolist(), groups=list(range(1000)))
    together = measure_auroc(labels.tolist(), scores.tolist(), groups=np.repeat(np.arange(40), 25).tolist())
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_one_class_has_no_auroc() -> None:
    auroc = measure_auroc([True, True], [0.1, 0.2], groups=[0, 1])
    assert auroc.value is None
    assert auroc.missing == "every item has the same label"
    assert measure_auroc([], [], groups=[]).missing == "nothing to score"
