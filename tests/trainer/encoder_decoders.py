"""Tiny random models with an encoder and a decoder, of the kinds whose heads and positions differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, BartConfig, MT5Config, T5Config

from tests.trainer.universal_reference import metaspace_tokenizer

_SMALL: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
ARCHITECTURES: dict[str, Callable[[int], Any]] = {
    "t5-tied-scaled": lambda rows: T5Config(vocab_size=rows + 3, tie_word_embeddings=True, **_SMALL),
    "mt5-untied-gated": lambda rows: MT5Config(vocab_size=rows, tie_word_embeddings=False, **_SMALL),
    "bart": lambda rows: BartConfig(
        vocab_size=rows,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=256,
        dropout=0.0,
        init_std=0.3,
    ),
}
PAD, START, BOS = 0, 5, 7
"""Apart from each other, so that none is taken for another."""


def make_encoder_decoder(name: str, directory: Path) -> Path:
    """The architecture ``name`` of random weights, saved to ``directory``; its tokenizer ends prompts as T5's does."""
    tokenizer = metaspace_tokenizer()
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", eos)]
    )
    tokenizer.save_pretrained(directory)
    config = ARCHITECTURES[name](len(tokenizer))
    config.eos_token_id, config.pad_token_id, config.bos_token_id = eos, PAD, BOS
    config.decoder_start_token_id, config.forced_eos_token_id = START, None
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=1.0)
        for parameter, weight in model.named_parameters():
            # Large enough to show who reads at the wrong place.
            if "embed_positions" in parameter:
                weight.normal_()
    torch.set_rng_state(state)
    model.save_pretrained(directory)
    return directory
