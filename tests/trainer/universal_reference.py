"""Universal logit distillation by plain means: which positions are compared, and how far apart they are."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from student_trainer.data import Example, encode_examples
from student_trainer.readings import with_readings
from tests.trainer.conftest import RECORDS

ULD = {"cross_tokenizer": "uld"}


def mean_distance(student: Path, teacher: Path) -> float:
    """Sorted distances from transformers' own logits in float64, summed where both have read the same text, per
    response token of RECORDS.
    """
    tokenizers = [AutoTokenizer.from_pretrained(directory) for directory in (student, teacher)]
    is_apart = AutoConfig.from_pretrained(student).is_encoder_decoder
    own = (AutoModelForSeq2SeqLM if is_apart else AutoModelForCausalLM).from_pretrained(student, dtype=torch.float64)
    others = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    examples = encode_examples(RECORDS, tokenizers[0], max_length=256)
    total, tokens = 0.0, 0
    for example in with_readings(
        examples, RECORDS, tokenizer=tokenizers[0], teacher=tokenizers[1], teacher_max_length=None
    ):
        assert example.reading is not None
        pairs = expected_pairs(example, tokenizers[0], RECORDS[example.index]["response"], tokenizers[1])
        prompt, response = example.token_ids[: example.prompt_length], example.token_ids[example.prompt_length :]
        start = example.reading.label_positions[0]
        with torch.no_grad():
            if is_apart:
                decoder_ids = torch.tensor([[own.config.decoder_start_token_id, *response[:-1]]])
                ours = own(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0]
            else:
                ours = own(input_ids=torch.tensor([example.token_ids])).logits[0, len(prompt) - 1 :]
            theirs = others(input_ids=torch.tensor([example.reading.token_ids])).logits[0, start - 1 :]
        p = theirs[[other for _, other in pairs], : len(tokenizers[1])].softmax(dim=1)
        q = ours[[place for place, _ in pairs], : len(tokenizers[0])].softmax(dim=1)
        total += wasserstein(p, q).item()
        tokens += len(response)
    return total / tokens


def wasserstein(p: Tensor, q: Tensor) -> Tensor:
    """Equation 5 of arXiv:2402.12030 as the authors compute it: sort, fill up with zeros, add the differences."""
    width = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in (p, q))
    return (q.sort(dim=1, descending=True).values - p.sort(dim=1, descending=True).values).abs().sum()


def expected_pairs(
    example: Example, student: PreTrainedTokenizerBase, response: str, teacher: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Places before which both tokenizers have read the same text, by decoding every prefix of both responses."""
    assert example.reading is not None
    prompt = example.reading.label_positions[0]
    students = prefixes(student, example.token_ids[example.prompt_length :])
    teachers = prefixes(teacher, example.reading.token_ids[prompt:])
    return [
        (place, other)
        for place, text in enumerate(students)
        for other, read in enumerate(teachers)
        if text == read and response.startswith(text)
    ]


def prefixes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text before each token; what ends within a character ends in a replacement character."""
    return [tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False) for place in range(len(ids))]


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Blanks as in SentencePiece, single bytes for characters that it has not seen."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The harbour master said that ferries had been repaired in the harbour."], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
