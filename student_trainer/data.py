"""Records as tokens: prompt and response, of which only the response is learnt.

Shape suffixes: B sequences, T tokens, N response tokens of the batch.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.contract.errors import DatasetError
from services.contract.prompt import Tokenizer, encode_record

log = logging.getLogger(__name__)

NOT_LEARNT = -100
"""Marks tokens outside responses in ``labels``, as transformers counts them."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A record as a teacher with another tokenizer reads it.

    Before ``label_positions[i]`` it has read as much of the response as the student has before the token at
    ``response_places[i]``, counted from the response's start. Both ascend.
    """

    token_ids: list[int]
    label_positions: list[int]
    response_places: list[int]


@dataclass(frozen=True, kw_only=True)
class Example:
    """``index``: the record's place in the data set, from 0; the response starts at ``prompt_length``.

    ``reading``: the teacher's own, where its tokenizer is another.
    """

    index: int
    token_ids: list[int]
    prompt_length: int
    reading: Reading | None = None

    @property
    def response_positions(self) -> range:
        return range(self.prompt_length, len(self.token_ids))


Collate = Callable[[Sequence[Example]], dict[str, Tensor]]
"""Makes a batch of examples: ``collate``, and others that return what it does."""


def split_held_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """What is learnt, and the last ``count``. DatasetError when nothing is left to learn."""
    if count >= len(examples):
        raise DatasetError(
            f"training.held_out {count} leaves none of {len(examples)} records to learn",
            fix="Hold out fewer records, or name a larger data set.",
        )
    learnt = len(examples) - count
    return list(examples[:learnt]), list(examples[learnt:])


def encode_examples(records: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, max_length: int) -> list[Example]:
    """One example per record that fits into ``max_length`` tokens; those that do not are left out with a warning.

    DatasetError when none fits.
    """
    examples, longest, too_long = [], 0, 0
    for index, record in enumerate(records):
        prompt_ids, response_ids = encode_record(tokenizer, record)
        if len(prompt_ids) + len(response_ids) <= max_length:
            examples.append(Example(index=index, token_ids=[*prompt_ids, *response_ids], prompt_length=len(prompt_ids)))
        else:
            too_long += 1
            longest = max(longest, len(prompt_ids) + len(response_ids))
    if not examples:
        raise DatasetError(
            f"none of {len(records)} records fits into {max_length} tokens; the longest has {longest}",
            fix="Raise training.max_length, within what the model and the teacher accept.",
        )
    if too_long:
        log.warning(
            "left out %d of %d records: with prompt and response they exceed %d tokens (the longest has %d)",
            too_long,
            len(records),
            max_length,
            longest,
        )
    return examples


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch, padded on the right.

    ``input_ids`` and ``attention_mask`` [B, T]; ``labels`` [B, T] with NOT_LEARNT outside responses; ``predictor_N``:
    where in the flattened B*T the hidden state lies that predicts each response token; ``learnt_N``: these tokens;
    ``record_B``: the examples' indices.
    """
    longest = max(len(example.token_ids) for example in examples)
    input_ids_BT = torch.zeros(len(examples), longest, dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    labels_BT = torch.full_like(input_ids_BT, NOT_LEARNT)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        input_ids_BT[row, :length] = torch.tensor(example.token_ids)
        attention_mask_BT[row, :length] = 1
        labels_BT[row, example.prompt_length : length] = input_ids_BT[row, example.prompt_length : length]
    response_N = (labels_BT != NOT_LEARNT).flatten().nonzero().squeeze(1)
    return {
        "input_ids": input_ids_BT,
        "attention_mask": attention_mask_BT,
        "labels": labels_BT,
        "predictor_N": response_N - 1,
        "learnt_N": labels_BT.flatten()[response_N],
        "record_B": torch.tensor([example.index for example in examples]),
    }


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model's forward pass takes."""
    # Positions keep records apart that share rows, and count only without a mask.
    apart = "position_ids" if "position_ids" in batch else "attention_mask"
    return {name: batch[name] for name in ("input_ids", apart, "decoder_input_ids") if name in batch}
