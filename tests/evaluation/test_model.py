"""Models under evaluation: what cannot be loaded is named."""

from pathlib import Path

import pytest

from services.contract.errors import ModelNotFoundError
from services.evaluation.model import load_model
from services.models.tiny import make_tiny_model


def test_weights_that_are_cut_short_are_named(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelNotFoundError, match=f"{directory} cannot be loaded as a language model"):
        load_model(str(directory))
