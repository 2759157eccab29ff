"""The encoder, kept in the user's cache between test runs, and articles that no training has seen."""

from pathlib import Path

import pytest

from services.contract.errors import ModelNotFoundError
from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.settings import Settings
from services.datasets.reading import load_items
from services.evaluation.consistency.encoding import Encoder
from services.models.minilm import encoder_directory


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(data_dir=Path.home() / ".cache" / "smoothkd-tests")


@pytest.fixture(scope="session")
def minilm(settings: Settings) -> Path:
    try:
        return encoder_directory(settings)
    except ModelNotFoundError as error:
        pytest.skip(f"needs the MiniLM encoder: {error.what}")


@pytest.fixture(scope="session")
def encoder(minilm: Path) -> Encoder:
    return Encoder(minilm)


@pytest.fixture(scope="session")
def news() -> list[tuple[str, str]]:
    """(article, reference) of the shipped news."""
    items = load_items(BenchmarkSpec(name="demo_news"), limit=None, offline=True)
    return [(item.source, item.reference) for item in items]
