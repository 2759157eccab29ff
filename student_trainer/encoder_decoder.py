"""Students with an encoder and a decoder, such as T5, mT0 and BART: the prompt goes into one, the response into the
other.

The decoder starts with a token of its own and reads the response up to the token that it is to say next, so each place
of it predicts the response token with the same number.

Shape suffixes: B sequences, S prompt tokens, T response tokens, N response tokens of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from student_trainer.data import NOT_LEARNT, Example


def collate_apart(examples: Sequence[Example], *, start_id: int) -> dict[str, Tensor]:
    """What ``data.collate`` returns, with ``input_ids`` and ``attention_mask`` [B, S] of the prompts alone.

    ``decoder_input_ids`` [B, T]: ``start_id`` and the response without its last token, padded on the right; ``labels``
    [B, T]; ``predictor_N``: where in the flattened B*T the hidden state lies that predicts each response token.
    """
    widest = max(example.prompt_length for example in examples)
    longest = max(len(example.response_positions) for example in examples)
    input_ids_BS = torch.zeros(len(examples), widest, dtype=torch.int64)
    attention_mask_BS = torch.zeros_like(input_ids_BS)
    decoder_input_ids_BT = torch.zeros(len(examples), longest, dtype=torch.int64)
    decoder_input_ids_BT[:, 0] = start_id
    labels_BT = torch.full_like(decoder_input_ids_BT, NOT_LEARNT)
    for row, example in enumerate(examples):
        prompt, response = example.token_ids[: example.prompt_length], example.token_ids[example.prompt_length :]
        input_ids_BS[row, : len(prompt)] = torch.tensor(prompt)
        attention_mask_BS[row, : len(prompt)] = 1
        decoder_input_ids_BT[row, 1 : len(response)] = torch.tensor(response[:-1])
        labels_BT[row, : len(response)] = torch.tensor(response)
    predictor_N = (labels_BT != NOT_LEARNT).flatten().nonzero().squeeze(1)
    return {
        "input_ids": input_ids_BS,
        "attention_mask": attention_mask_BS,
        "decoder_input_ids": decoder_input_ids_BT,
        "labels": labels_BT,
        "predictor_N": predictor_N,
        "learnt_N": labels_BT.flatten()[predictor_N],
        "record_B": torch.tensor([example.index for example in examples]),
    }
