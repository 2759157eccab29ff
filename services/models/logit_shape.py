"""What some architectures do to logits after the output head: scale them, or cap them softly."""

from collections.abc import Mapping
from typing import Any


def logit_scale(config: Mapping[str, Any]) -> float:
    """What logits are multiplied with, from a model's configuration as a mapping.

    Granite divides by ``logits_scaling``, HyperCLOVA X multiplies with it; Cohere has ``logit_scale``, Falcon-H1
    ``lm_head_multiplier``, Jamba's relatives ``output_multiplier``.
    """
    scaling = _first(config, "logits_scaling")
    if scaling is not None:
        return scaling if str(config.get("model_type")).startswith("hyperclovax") else 1.0 / scaling
    scale = _first(config, "logit_scale", "lm_head_multiplier", "output_multiplier")
    return 1.0 if scale is None else scale


def soft_cap(config: Mapping[str, Any]) -> float:
    """The bound that tanh bends logits under (Gemma 2, arXiv:2408.00118, section 2); 0 where there is none."""
    return _first(config, "final_logit_softcapping", "output_logit_soft_cap") or 0.0


def _first(config: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        if isinstance(config.get(name), int | float):
            return float(config[name])
    return None
