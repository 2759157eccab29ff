"""Weights from a directory, every one of them: what a file lacks would otherwise be drawn at random and judged."""

from typing import Any

import torch
from safetensors import SafetensorError

from services.contract.errors import ModelNotFoundError


def load_whole(
    kind: Any, directory: str, *, role: str, dtype: torch.dtype | str = torch.float32, quantized: Any = None
) -> Any:
    """A model of ``kind``, a class of transformers. ``role``: what it shall be, for messages; ``quantized``: how its
    weights are quantised while they are loaded.

    ModelNotFoundError for weights that cannot be read, are not there, or have other shapes than the configuration says.
    """
    try:
        model, found = kind.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, output_loading_info=True, quantization_config=quantized
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _unfit(directory, role, first) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _unfit(directory, role, "its weights have other shapes than its config.json says") from None
    if missing := sorted(found["missing_keys"]):
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise _unfit(directory, role, f"its weights lack {missing[0]}{others}")
    return model


def _unfit(directory: str, role: str, why: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{directory} cannot be loaded as {role}: {why}",
        fix="Name a directory that save_pretrained wrote for both model and tokenizer, and copied whole.",
    )
