"""The encoder, and articles that no training has seen."""

import pytest

from services.contract.evaluation_spec import BenchmarkSpec
from services.datasets.reading import load_items
from services.evaluation.consistency.encoding import Encoder
from services.evaluation.consistency.weights import SHIPPED


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder(SHIPPED)


@pytest.fixture(scope="session")
def news() -> list[tuple[str, str]]:
    """(article, reference) of the shipped news."""
    items = load_items(BenchmarkSpec(name="demo_news"), limit=None, offline=True)
    return [(item.source, item.reference) for item in items]
