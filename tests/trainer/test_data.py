import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from services.contract.errors import DatasetError
from student_trainer.data import NOT_LEARNT, collate, encode_examples
from tests.trainer.conftest import RECORDS


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


def test_only_the_response_and_its_end_are_learnt(tokenizer) -> None:
    examples = encode_examples(RECORDS, tokenizer, max_length=256)
    batch = collate(examples[:3])
    for row, record in enumerate(RECORDS[:3]):
        learnt = batch["labels"][row][batch["labels"][row] != NOT_LEARNT]
        assert tokenizer.decode(learnt) == record["response"] + tokenizer.eos_token
        text = tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row] == 1])
        request = record["instruction"] + (f"\n\n{record['context']}" if record["context"] else "")
        assert text == (f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n{record['response']}<|im_end|>")


def test_predictors_stand_one_before_what_they_predict(tokenizer) -> None:
    batch = collate(encode_examples(RECORDS, tokenizer, max_length=256))
    width = batch["input_ids"].shape[1]
    expected = [
        (row * width + place - 1, int(batch["input_ids"][row, place]))
        for row in range(len(RECORDS))
        for place in range(width)
        if batch["labels"][row, place] != NOT_LEARNT
    ]
    predicted = batch["input_ids"].flatten()[batch["predictor_N"] + 1]
    assert list(zip(batch["predictor_N"].tolist(), predicted.tolist(), strict=True)) == expected


def test_a_batch_of_one_is_not_padded(tokenizer) -> None:
    (example,) = encode_examples(RECORDS[:1], tokenizer, max_length=256)
    batch = collate([example])
    assert batch["input_ids"].tolist() == [example.token_ids]
    assert torch.equal(batch["attention_mask"], torch.ones_like(batch["attention_mask"]))


def test_records_that_are_too_long_are_counted_aloud(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    everything = encode_examples(RECORDS, tokenizer, max_length=256)
    lengths = sorted(len(example.token_ids) for example in everything)
    with caplog.at_level(logging.WARNING):
        kept = encode_examples(RECORDS, tokenizer, max_length=lengths[-3])
    assert [example.index for example in kept] == [e.index for e in everything if len(e.token_ids) <= lengths[-3]]
    left_out = len(RECORDS) - len(kept)
    assert left_out >= 2
    assert f"left out {left_out} of {len(RECORDS)} records" in caplog.text
    assert f"the longest has {lengths[-1]}" in caplog.text
    with pytest.raises(DatasetError, match=f"none of {len(RECORDS)} records fits into 8 tokens"):
        encode_examples(RECORDS, tokenizer, max_length=8)
