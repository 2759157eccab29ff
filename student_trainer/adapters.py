"""Students that train low-rank adapters (LoRA, QLoRA) instead of all their weights, through PEFT."""

import importlib.util
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from services.contract.distillation_spec import LoraSpec
from services.contract.errors import MissingExtraError, SpecError, UnsupportedError

ADAPTER = "adapter"
"""Folder of the adapter inside a final model's directory."""


def attach_adapters(model: PreTrainedModel, spec: LoraSpec, *, seed: int) -> PeftModel:
    """The model with its weights frozen and adapters on the layers that ``spec`` names, trainable, in float32.

    SpecError names the layers there are when one that is named is not there, or cannot be changed alone.
    """
    layers = _linear_layers(model)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=sorted(_targets(model, spec, layers)),
        # Of GPT-2's layers, which keep their weights transposed.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    # A run that starts again must start with the same adapters.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def quantization(spec: LoraSpec | None, *, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the frozen weights are held; None for as they are.

    MissingExtraError without bitsandbytes; UnsupportedError for fp16 arithmetic on a processor.
    """
    if spec is None or spec.quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "student.lora.quantize needs bitsandbytes, which is not installed", fix="Run pip install 'smoothkd[qlora]'."
        )
    if compute_dtype == torch.float16 and not torch.cuda.is_available():
        raise UnsupportedError(
            "student.lora.quantize with precision fp16 needs a GPU", fix="Set training.precision to bf16 or fp32."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a processor, through which no gradient flows."""
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def adapted_weight(layer: Any) -> torch.Tensor:
    """A linear layer's weight with what its adapter adds, where it has one; gradients reach the adapter."""
    weight: torch.Tensor = layer.weight
    for name in layer.active_adapters if isinstance(layer, LoraLayer) else ():
        weight = weight + layer.get_delta_weight(name)
    return weight


def merged_model(model: PeftModel) -> PreTrainedModel:
    """The plain model with the adapters merged in; ``model`` is used up.

    Of quantised weights the 4-bit values that the adapters were trained with are taken, not those they were made of.
    """
    base: Any = model.get_base_model()
    merged: PreTrainedModel
    if getattr(base, "quantization_method", None) is None:
        merged = model.merge_and_unload()
        return merged
    # PEFT would round the sum to 4 bits again, so the adapters come off, and back on once the weights are whole.
    with tempfile.TemporaryDirectory(prefix="smoothkd-adapter-") as folder:
        save_adapter(model, Path(folder), base_model=base.name_or_path)
        whole = cast(Any, model.unload()).dequantize(base.dtype)
        merged = PeftModel.from_pretrained(whole, folder).merge_and_unload()
    return merged


def save_adapter(model: PeftModel, directory: Path, *, base_model: str) -> None:
    """The adapter alone, as PEFT loads it onto ``base_model``."""
    config = model.peft_config[model.active_adapter]
    before, config.base_model_name_or_path = config.base_model_name_or_path, base_model
    try:
        # Otherwise PEFT asks the hub whether the vocabulary has grown.
        model.save_pretrained(str(directory), save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = before


def _linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)}


def _targets(model: PreTrainedModel, spec: LoraSpec, layers: dict[str, torch.nn.Module]) -> set[str]:
    """Full names of the layers that get an adapter."""
    head = next((name for name, layer in layers.items() if layer is model.get_output_embeddings()), None)
    if spec.target_modules is None:
        return set(layers) - {head}
    found: set[str] = set()
    for target in spec.target_modules:
        matching = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not matching:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise SpecError(
                f"student.lora.target_modules: no linear layer of {type(model).__name__} is called {target!r}",
                fix=f"Name some of {', '.join(known)}, or leave target_modules out for all but the output head.",
            )
        found |= matching
    if head in found and model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        raise SpecError(
            f"student.lora.target_modules: the output head {head} shares its weights with the embedding",
            fix="Leave it out: an adapter would have to change both.",
        )
    if head in found and spec.dropout:
        raise SpecError(
            f"student.lora.dropout cannot be applied to the output head {head}, which the loss computes itself",
            fix=f"Set dropout to 0, or leave {head} out of target_modules.",
        )
    return found
