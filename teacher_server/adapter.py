"""LoRA adapters on models that transformers computes."""

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from services.contract.errors import ModelNotFoundError
from teacher_server.weights import ADAPTER_WEIGHTS


def merge_adapter(model: Any, adapter: Path) -> Any:
    """``model`` with the LoRA adapter added to its weights. ModelNotFoundError when the two do not fit."""
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as tensors:
            there = set(tensors.keys())
        adapted = PeftModel.from_pretrained(model, str(adapter))
        # Where tensors of the adapter are missing, PEFT only warns.
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if wanted != there:
            name = min(wanted ^ there)
            raise ValueError(f"it lacks the tensor {name}" if name in wanted else f"the model has no place for {name}")
        return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"the adapter in {adapter} cannot be added to the model: {' '.join(str(error).split())[:300]}",
            fix="Load an adapter of this very model, whole and with finite weights.",
        ) from error
