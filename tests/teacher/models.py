"""Tiny random models of the architectures whose heads differ, with logits large enough for the differences to show."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ARCHITECTURES = {
    "llama-untied": lambda rows: LlamaConfig(vocab_size=rows, tie_word_embeddings=False, **_SMALL),
    "llama-padded": lambda rows: LlamaConfig(vocab_size=rows + 37, tie_word_embeddings=False, **_SMALL),
    "qwen2-tied-padded": lambda rows: Qwen2Config(vocab_size=rows + 64, tie_word_embeddings=True, **_SMALL),
    "gemma2-soft-cap": lambda rows: Gemma2Config(
        vocab_size=rows, final_logit_softcapping=5.0, head_dim=8, sliding_window=16, **_SMALL
    ),
    "granite-scaled": lambda rows: GraniteConfig(vocab_size=rows, logits_scaling=3.0, **_SMALL),
    "cohere-scaled": lambda rows: CohereConfig(vocab_size=rows, logit_scale=0.5, **_SMALL),
    "phi-bias": lambda rows: PhiConfig(vocab_size=rows, tie_word_embeddings=False, **_SMALL),
    "qwen3-untied": lambda rows: Qwen3Config(vocab_size=rows, head_dim=8, tie_word_embeddings=False, **_SMALL),
    "gemma3-scaled-embeddings": lambda rows: Gemma3TextConfig(
        vocab_size=rows, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, **_SMALL
    ),
    "mistral-sliding": lambda rows: MistralConfig(vocab_size=rows, sliding_window=16, **_SMALL),
    "neox-embed-out": lambda rows: GPTNeoXConfig(vocab_size=rows + 5, tie_word_embeddings=False, **_SMALL),
    "opt-projected": lambda rows: OPTConfig(
        vocab_size=rows,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=24,
        dropout=0.0,
    ),
    "bloom-normed-embeddings": lambda rows: BloomConfig(vocab_size=rows, hidden_size=32, n_layer=2, n_head=4),
    "gpt2-tied": lambda rows: GPT2Config(
        vocab_size=rows,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}


def make_model(name: str, directory: Path, *, tokenizer_from: Path) -> Path:
    """The architecture ``name`` of random weights, saved to ``directory`` with the tokenizer of another model."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    tokenizer.save_pretrained(directory)
    config: PretrainedConfig = ARCHITECTURES[name](len(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.normal_(std=0.6)
        if getattr(head, "bias", None) is not None:
            head.bias.normal_()
    torch.set_rng_state(state)
    model.save_pretrained(directory)
    return directory
