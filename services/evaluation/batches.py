"""Token sequences of different lengths in batches of like length."""

from collections.abc import Sequence

import torch

MOST_TOKENS = 8192
"""Of one batch, padding included."""


def by_length(lengths: Sequence[int], *, most_tokens: int = MOST_TOKENS, most_rows: int = 32) -> list[list[int]]:
    """Indices in batches, longest first; a sequence that is longer than ``most_tokens`` is a batch by itself."""
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not batches or len(batches[-1]) == most_rows or (len(batches[-1]) + 1) * longest > most_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def pad_right(rows: Sequence[Sequence[int]], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (B, T)."""
    longest = max(map(len, rows))
    ids_BT = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row)] = torch.tensor(row)
        mask_BT[place, : len(row)] = 1
    return ids_BT, mask_BT
