"""The output head alone, read from a checkpoint's files: vLLM's pooling runner does not load it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from services.contract.errors import UnsupportedError


class CheckpointHead:
    """What TorchHead needs of a model: ``config`` and ``get_output_embeddings()``."""

    def __init__(self, config: Any, layer: Any) -> None:
        self.config = config
        self._layer = layer

    def get_output_embeddings(self) -> Any:
        return self._layer


def load_checkpoint_head(
    directory: Path, *, dtype: torch.dtype, device: str, trust_remote_code: bool = False
) -> CheckpointHead:
    """Weight [V, D] and bias [V] of the head in ``dtype`` on ``device``; UnsupportedError when no file holds them.

    A head tied to the embedding is the embedding. Names come from the architecture as transformers builds it,
    without its weights.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layer = skeleton.get_output_embeddings()
    if layer is None:
        raise UnsupportedError(
            f"{type(skeleton).__name__} has no output head", fix="Serve a causal language model as the teacher."
        )
    files = _files_by_tensor(directory)
    names = {id(module): name for name, module in skeleton.named_modules()}
    tied = [names[id(skeleton.get_input_embeddings())]] if config.get_text_config().tie_word_embeddings else []
    weight = _find(files, [names[id(layer)], *tied], "weight")
    bias = _find(files, [names[id(layer)]], "bias") if getattr(layer, "bias", None) is not None else None
    if weight is None:
        raise UnsupportedError(
            f"{directory} holds no tensor {names[id(layer)]}.weight in safetensors files",
            fix="Convert older files with save_pretrained; the head must have its own tensor or be tied.",
        )
    return CheckpointHead(
        config,
        _Layer(
            weight=_read(weight, files).to(device=device, dtype=dtype, copy=True),
            bias=None if bias is None else _read(bias, files).to(device=device, dtype=dtype, copy=True),
        ),
    )


class _Layer:
    def __init__(self, *, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in weight_map.items()}
    names: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def _find(files: dict[str, Path], modules: list[str], parameter: str) -> str | None:
    """The tensor of the first module that the files hold; a prefix that wraps a text model in a larger one may lead."""
    for module in modules:
        wanted = f"{module}.{parameter}"
        if wanted in files:
            return wanted
        like = [name for name in files if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
        if len(like) == 1:
            return like[0]
    return None


def _read(name: str, files: dict[str, Path]) -> torch.Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor
