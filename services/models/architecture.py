"""Decoders alone, such as Llama, and decoders with an encoder, such as T5: how each is loaded and starts to write."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from services.contract.errors import UnsupportedError


def language_model_class(directory: str) -> Any:
    """The class whose ``from_pretrained`` loads the model in ``directory`` with its output head."""
    return AutoModelForSeq2SeqLM if has_encoder(directory) else AutoModelForCausalLM


def has_encoder(directory: str) -> bool:
    """Whether the model in ``directory`` reads prompts with an encoder of their own."""
    return bool(AutoConfig.from_pretrained(directory).is_encoder_decoder)


def decoder_start(model: Any) -> int | None:
    """The token that the decoder of ``model`` starts with; None for a model that is a decoder alone.

    UnsupportedError where the model does not name one.
    """
    if not model.config.is_encoder_decoder:
        return None
    for settings in (model.generation_config, model.config):
        start = getattr(settings, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise UnsupportedError(
        f"{type(model).__name__} does not say which token its decoder starts with",
        fix="Set decoder_start_token_id in its generation_config.json; T5 and mT0 start with their padding token.",
    )
