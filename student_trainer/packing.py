"""Several records in one row, so that little of a batch is padding, and each as if it were alone.

Positions count from 0 in every record. Without an attention mask transformers tells by them where one record ends and
the next begins, and lets none look into another.

Shape suffixes: B rows, T tokens, N response tokens of the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from services.contract.errors import UnsupportedError
from student_trainer.data import NOT_LEARNT, Example, model_inputs
from student_trainer.student import PROBE_TOLERANCE, final_hidden_states


def pack(examples: Sequence[Example], *, max_length: int) -> dict[str, Tensor]:
    """What ``collate`` returns, in as few rows of at most ``max_length`` tokens as first-fit finds, longest first.

    With it ``position_ids`` [B, T]. ``predictor_N`` keeps the examples' own order, whatever row they stand in.
    """
    places = _places([len(example.token_ids) for example in examples], room=max_length)
    ends = [start + len(example.token_ids) for (_, start), example in zip(places, examples, strict=True)]
    shape = (1 + max(row for row, _ in places), max(ends))
    input_ids_BT = torch.zeros(shape, dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    labels_BT = torch.full_like(input_ids_BT, NOT_LEARNT)
    position_ids_BT = torch.zeros_like(input_ids_BT)
    predictors = []
    for example, (row, start), end in zip(examples, places, ends, strict=True):
        response = start + example.prompt_length
        input_ids_BT[row, start:end] = torch.tensor(example.token_ids)
        attention_mask_BT[row, start:end] = 1
        labels_BT[row, response:end] = input_ids_BT[row, response:end]
        position_ids_BT[row, start:end] = torch.arange(end - start)
        predictors.append(row * shape[1] + torch.arange(response - 1, end - 1))
    return {
        "input_ids": input_ids_BT,
        "attention_mask": attention_mask_BT,
        "position_ids": position_ids_BT,
        "labels": labels_BT,
        "predictor_N": torch.cat(predictors),
        "learnt_N": input_ids_BT.flatten()[torch.cat(predictors) + 1],
        "record_B": torch.tensor([example.index for example in examples]),
    }


def require_packable(model: PreTrainedModel | PeftModel, *, vocab_size: int) -> None:
    """UnsupportedError unless records in one row get the hidden states that each has alone."""
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__} reads prompts and responses in two networks, for which records are not packed",
            fix="Set training.packing to false.",
        )
    layer: Any = model.get_output_embeddings()
    device = layer.weight.device
    records = [
        Example(
            index=length, token_ids=[(7 * length + 3 * place) % vocab_size for place in range(length)], prompt_length=1
        )
        for length in (9, 6, 5)
    ]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = {name: tensor.to(device) for name, tensor in pack(records, max_length=15).items()}
        together_BTD = final_hidden_states(model, head_layer=layer, **model_inputs(packed))
        found_ND = together_BTD.flatten(0, 1)[packed["predictor_N"]]
        alone = [
            final_hidden_states(model, head_layer=layer, input_ids=torch.tensor([record.token_ids], device=device))
            for record in records
        ]
        expected_ND = torch.cat([hidden_1TD[0, :-1] for hidden_1TD in alone])
    model.train(was_training)
    error = ((found_ND - expected_ND).abs().max() / expected_ND.abs().max().clamp_min(1e-6)).item()
    if not error <= PROBE_TOLERANCE[found_ND.dtype]:
        raise UnsupportedError(
            f"{type(model).__name__} does not keep records apart that share a row: hidden states differ by {error:.2%}",
            fix="Set training.packing to false.",
        )


def _places(lengths: Sequence[int], *, room: int) -> list[tuple[int, int]]:
    """Row and first column of each."""
    filled: list[int] = []
    places = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        row = next((row for row, taken in enumerate(filled) if taken + length <= room), len(filled))
        if row == len(filled):
            filled.append(0)
        places[index] = (row, filled[row])
        filled[row] += length
    return places
