"""Which model a lens belongs to: its architecture, and a sample of its weights that fine-tuning hardly moves."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from transformers import PretrainedConfig, PreTrainedModel

from services.evaluation.finite import not_finite

SAMPLES = 256
SAME = 0.01
"""Relative difference up to which weights are the same, rounded to another precision."""
FINE_TUNED = 0.9
"""Cosine similarity from which weights come from the same pre-training; that of unrelated models is near 0."""


class ModelFingerprint(BaseModel):
    """``weights`` is None where only the architecture is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    architecture: dict[str, int | str]
    weights: list[float] | None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def relation(self, other: "ModelFingerprint") -> str | None:
        """``same``, ``fine-tuned`` (one from the other, or both from one), ``architecture`` where a fingerprint has no
        weights to compare, or None for another model."""
        if any(other.architecture.get(name) != value for name, value in self.architecture.items()):
            return None
        if self.weights is None or other.weights is None:
            return "architecture"
        mine, theirs = np.array(self.weights), np.array(other.weights)
        if np.linalg.norm(mine - theirs) <= SAME * np.linalg.norm(mine):
            return "same"
        cosine = mine @ theirs / max(np.linalg.norm(mine) * np.linalg.norm(theirs), 1e-30)
        return "fine-tuned" if cosine >= FINE_TUNED else None


def fingerprint_model(model: PreTrainedModel) -> ModelFingerprint:
    """Sizes from the configuration, and values at fixed places of the layers' weight matrices.

    EvaluationError for values that are not finite.
    """
    with torch.inference_mode():
        weights = list(_sample(model))
    if not np.isfinite(weights).all():
        raise not_finite("weights")
    return ModelFingerprint(architecture=architecture_of(model.config), weights=weights)


def architecture_of(config: PretrainedConfig) -> dict[str, int | str]:
    """The kind of a model and its sizes, as far as it has the usual ones."""
    text = config.get_text_config()
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    sizes = {name: int(size) for name in names if (size := getattr(text, name, None)) is not None}
    return {"model_type": text.model_type, **sizes}


def _sample(model: PreTrainedModel) -> Iterator[float]:
    # Embeddings and norms are left out: norms are alike in all models, and embeddings may grow.
    outside = {id(model.get_input_embeddings().weight), id(getattr(model.get_output_embeddings(), "weight", None))}
    matrices = [
        matrix.detach()
        for _, matrix in sorted(model.named_parameters())
        if matrix.ndim == 2 and id(matrix) not in outside
    ]
    for index in range(SAMPLES):
        matrix = matrices[index % len(matrices)]
        # A multiplicative hash spreads the places over the matrix.
        place = (index * 2654435761) % matrix.numel()
        yield float(f"{matrix.flatten()[place].item():.6g}")
