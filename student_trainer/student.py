"""The student: its model and tokenizer, its output head, and its final hidden states.

Shape suffixes: B sequences, T tokens, D hidden size, R rows of the head, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from services.contract.distillation_spec import StudentSpec
from services.contract.errors import UnsupportedError
from services.contract.settings import Settings
from services.models.architecture import decoder_start, language_model_class
from services.models.loading import load_whole
from services.models.logit_shape import logit_scale, soft_cap
from services.models.resolve import resolve_model
from student_trainer.adapters import (
    ADAPTER,
    adapted_weight,
    attach_adapters,
    keep_trainable,
    merged_model,
    quantization,
    save_adapter,
)
from student_trainer.output_head import OutputHead, output_logits

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""How far recomputed logits may lie from the model's own, as a share of their largest magnitude."""


def load_tokenizer(spec: StudentSpec, settings: Settings) -> PreTrainedTokenizerBase:
    """The student's tokenizer. ModelNotFoundError where there is no such model."""
    directory = resolve_model(spec.model, revision=spec.revision, settings=settings)
    return AutoTokenizer.from_pretrained(directory)


def load_student(
    spec: StudentSpec,
    settings: Settings,
    *,
    vocab_size: int,
    frozen_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel | PeftModel:
    """The student's model, ready to train: all of its weights in float32, or adapters of its own ``seed`` on weights
    that are frozen in ``frozen_dtype``.

    ModelNotFoundError for weights that cannot be read, or are not all there. UnsupportedError when its logits are not
    those of one output head that covers ``vocab_size`` tokens. SpecError and MissingExtraError for adapters that cannot
    be had.
    """
    quantized = quantization(spec.lora, compute_dtype=frozen_dtype)
    directory = resolve_model(spec.model, revision=spec.revision, settings=settings)
    transformers_logging.disable_progress_bar()
    dtype = torch.float32 if spec.lora is None else frozen_dtype
    model: PreTrainedModel = load_whole(
        language_model_class(directory), directory, role="a student", dtype=dtype, quantized=quantized
    )
    _make_generation_config_savable(model)
    if quantized is not None:
        keep_trainable(model)
    check_head(model, vocab_size=vocab_size)
    return model if spec.lora is None else attach_adapters(model, spec.lora, seed=seed)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus 1; rows of the head beyond it are padding."""
    return int(max(tokenizer.get_vocab().values())) + 1


def longest_sequence(spec: StudentSpec, settings: Settings) -> int | None:
    """The most tokens that the model has positions for; None where any number will do."""
    directory = resolve_model(spec.model, revision=spec.revision, settings=settings)
    config = AutoConfig.from_pretrained(directory)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def save_student(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    dtype: torch.dtype,
    base_model: str = "",
) -> None:
    """Model, tokenizer and generation settings, as ``transformers`` and ``vllm serve`` load them.

    Adapters are merged into the model, and also saved by themselves in ``adapter/``, to go onto ``base_model``.
    """
    if isinstance(model, PeftModel):
        save_adapter(model, directory / ADAPTER, base_model=base_model)
        model = merged_model(model)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def output_head(model: PreTrainedModel | PeftModel) -> OutputHead:
    """The model's own parameters, so that gradients reach them; of a head with an adapter, as it is at this step."""
    layer: Any = model.get_output_embeddings()
    config = model.config.get_text_config().to_dict()
    return OutputHead(
        weight_RD=adapted_weight(layer),
        bias_R=getattr(layer, "bias", None),
        logit_scale=logit_scale(config),
        soft_cap=soft_cap(config),
    )


def final_hidden_states(model: torch.nn.Module, *, head_layer: torch.nn.Module, **inputs: Tensor) -> Tensor:
    """What the output head receives, [B, T, D], from a forward pass that spares the head all positions but the first.

    ``model`` may be wrapped (DDP, autocast): its own forward runs, and ``head_layer`` is the unwrapped model's.
    """
    captured: list[Tensor] = []

    def capture(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(arguments[0])
        return (arguments[0][:, :1], *arguments[1:])

    handle = head_layer.register_forward_pre_hook(capture)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    (hidden_BTD,) = captured
    return hidden_BTD


def loss_at_head(
    model: torch.nn.Module,
    *,
    head_layer: torch.nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    **inputs: Tensor,
) -> Tensor:
    """The scalar that ``loss_of`` makes of what the output head receives, [B, T, D], in the head's own place.

    Within the forward pass the head's weights are whole even where processes share them (FSDP2, DeepSpeed's ZeRO-3),
    whose hooks gather them there. ``model`` and ``head_layer`` are as for ``final_hidden_states``.
    """
    losses: list[Tensor] = []

    def in_its_place(hidden_BTD: Tensor) -> Tensor:
        losses.append(loss_of(hidden_BTD))
        return losses[0] * 0.0 + losses[0].new_zeros(1, 1, 1)

    own = vars(head_layer).get("forward")
    head_layer.forward = in_its_place
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        del head_layer.forward
        if own is not None:
            head_layer.forward = own
    (loss,) = losses
    # Those hooks wait for a gradient on the model's outputs; this one is 0, and so is the value.
    return loss + logits.sum()


def check_head(model: PreTrainedModel, *, vocab_size: int) -> None:
    """UnsupportedError unless hidden states and ``output_head`` give the very logits that the model gives."""
    layer: Any = model.get_output_embeddings()
    name = type(model).__name__
    if layer is None or not hasattr(layer, "weight"):
        raise UnsupportedError(f"{name} has no output head", fix="Choose a model that writes text as the student.")
    if layer.weight.shape[0] < vocab_size:
        raise UnsupportedError(
            f"the tokenizer has {vocab_size} ids, the student's output head only {layer.weight.shape[0]} rows",
            fix="Use the tokenizer that belongs to the model, or resize the model's embeddings.",
        )
    was_training = model.training
    model.eval()
    ids_BT = torch.arange(min(8, vocab_size), device=layer.weight.device).unsqueeze(0)
    inputs = {"input_ids": ids_BT} | ({} if decoder_start(model) is None else {"decoder_input_ids": ids_BT})
    with torch.no_grad():
        expected_BTV = model(**inputs, use_cache=False).logits[..., :vocab_size].float()
        hidden_BTD = final_hidden_states(model, head_layer=layer, **inputs)
        found_NV = output_logits(hidden_BTD.flatten(0, 1), head=output_head(model), vocab_size=vocab_size)
    model.train(was_training)
    error = (found_NV - expected_BTV.flatten(0, 1)).abs().max() / expected_BTV.abs().max().clamp_min(1e-6)
    if not error <= PROBE_TOLERANCE[layer.weight.dtype]:
        raise UnsupportedError(
            f"{name} does something to its logits that this release does not know: they differ by {error:.2%}",
            fix="Choose a student of another architecture, such as Llama, Qwen, Gemma, Mistral, GPT-NeoX or T5.",
        )


def _make_generation_config_savable(model: PreTrainedModel) -> None:
    # Some published models sample by temperature without saying do_sample; saving such a model is refused.
    if model.generation_config is not None:
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config.do_sample = True
