"""The sentence encoder, kept in the user's cache between test runs."""

from pathlib import Path

import pytest

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.models.minilm import encoder_directory


@pytest.fixture(scope="session")
def minilm() -> Path:
    try:
        return encoder_directory(Settings(data_dir=Path.home() / ".cache" / "smoothkd-tests"))
    except ModelNotFoundError as error:
        pytest.skip(f"needs the MiniLM encoder: {error.what}")
