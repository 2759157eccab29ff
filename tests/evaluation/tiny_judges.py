"""Tiny random models in the layout of published judges: HHEM, an NLI cross-encoder, a sentence encoder."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForTokenClassification,
)

TEXTS = [
    "Determine if the hypothesis is true given the premise? Premise: Hypothesis:",
    "The harbour master of Ostrel said on Tuesday that 14 ferries had been repaired.",
    "Rain fell on the valley. Two bridges were closed, and a school moved its lessons to the town hall.",
    "A mayor opened a library with 9,000 books, and nobody knew why it had taken so long.",
]


def make_hhem(directory: Path, *, seed: int = 0) -> T5ForTokenClassification:
    """Files as the hub has them: weights under ``t5.``, the embedding once, and a description without any size."""
    directory.mkdir(parents=True)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    # As published: cut to 512 tokens unless told otherwise.
    tokenizer.enable_truncation(512)
    foundation = directory / "foundation"
    foundation.mkdir()
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    sizes |= {"vocab_size": tokenizer.get_vocab_size(), "tie_word_embeddings": False}
    (foundation / "config.json").write_text(json.dumps({"model_type": "t5", **sizes}))
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(seed)
    model = T5ForTokenClassification(T5Config(**sizes, num_labels=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    state = {f"t5.{name}": value.clone() for name, value in model.state_dict().items() if "embed_tokens" not in name}
    save_file(state, directory / "model.safetensors")
    description = {
        "architectures": ["HHEMv2ForSequenceClassification"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_hhem_v2.HHEMv2ForSequenceClassification"},
        "model_type": "HHEMv2",
        "foundation": "foundation",
    }
    (directory / "config.json").write_text(json.dumps(description))
    return model


def make_nli(directory: Path, *, labels: tuple[str, ...] = ("contradiction", "ENTAILMENT", "neutral")) -> Any:
    """A BERT cross-encoder of 64 positions."""
    tokenizer = _word_pieces(directory)
    torch.manual_seed(1)
    config = _bert(tokenizer, num_labels=len(labels), id2label=dict(enumerate(labels)))
    model = BertForSequenceClassification(config).eval()
    _shake(model)
    model.save_pretrained(directory)
    return model


def make_encoder(directory: Path) -> Any:
    tokenizer = _word_pieces(directory)
    torch.manual_seed(2)
    model = BertModel(_bert(tokenizer)).eval()
    _shake(model)
    model.save_pretrained(directory)
    return model


def _bert(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        **fields,
    )


def _shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.8)


def _word_pieces(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    fast.save_pretrained(directory)
    return fast
