"""The encoder, and articles that no training has seen."""

from pathlib import Path

import pytest

from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.settings import Settings
from services.datasets.reading import load_items
from services.evaluation.consistency.encoding import Encoder


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(data_dir=Path.home() / ".cache" / "smoothkd-tests")


@pytest.fixture(scope="session")
def encoder(minilm: Path) -> Encoder:
    return Encoder(minilm)


@pytest.fixture(scope="session")
def news() -> list[tuple[str, str]]:
    """(article, reference) of the shipped news."""
    items = load_items(BenchmarkSpec(name="demo_news"), limit=None, offline=True)
    return [(item.source, item.reference) for item in items]
