"""Models under evaluation: what cannot be loaded is named."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.evaluation.lookback.features import load_lens_model
from services.evaluation.model import load_model
from services.models.tiny import make_tiny_model


def test_weights_that_are_cut_short_are_named(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelNotFoundError, match=f"{directory} cannot be loaded as a language model"):
        load_model(str(directory))


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    column = weights.pop(name)[:, :-1].contiguous()
    for kept, why in [
        (weights, f"its weights lack {name}$"),
        ({**weights, name: column}, "other shapes than its config.json says"),
    ]:
        save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelNotFoundError) as raised:
            load_model(str(directory))
        assert re.search(why, raised.value.what)
        with pytest.raises(ModelNotFoundError) as raised:
            load_lens_model(str(directory), settings=Settings(data_dir=tmp_path))
        assert re.search(why, raised.value.what)
