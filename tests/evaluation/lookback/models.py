"""Tiny random decoders of four architectures, and lookback ratios from the matrices that eager attention returns."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from services.evaluation.lookback.measure import Prompt

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}


def make_decoder(architecture: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    elif architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))
    else:
        # Layers of sliding and of full attention in turn, and soft-capped attention logits.
        config = Gemma2Config(
            **SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, attn_logit_softcapping=2.0
        )
        model = Gemma2ForCausalLM(config)
    return model.eval()


def eager_ratios(model: PreTrainedModel, prompt: Prompt, answer: list[int]) -> torch.Tensor:
    """The definition, word for word, from one unpadded sequence and all its attention matrices: (T, L, H)."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt.ids + answer[:-1]])
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(own)
    steps = []
    for step in range(len(answer)):
        query = len(prompt.ids) - 1 + step
        layers = []
        for attention in attentions:
            weights = attention[0, :, query, : query + 1]
            context = weights[:, : prompt.context_tokens].mean(-1)
            new = weights[:, prompt.context_tokens :].mean(-1)
            layers.append(context / (context + new))
        steps.append(torch.stack(layers))
    return torch.stack(steps)
