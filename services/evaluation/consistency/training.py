"""Fitting the consistency network to claims whose words, or which as a whole, are labelled."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from services.evaluation.consistency.batching import EncodedClaim, encode_pairs, make_batch
from services.evaluation.consistency.encoding import Encoder
from services.evaluation.consistency.labelled import Example
from services.evaluation.consistency.network import ConsistencyNetwork

BATCH_SIZE = 32
WARM_UP = 0.06
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LabelledClaim:
    """``example``: index of the example it is part of. ``words_W`` and ``label`` are None where nobody judged.

    ``weight``: how much it counts in the loss.
    """

    encoded: EncodedClaim
    example: int
    words_W: npt.NDArray[np.float32] | None
    label: float | None
    weight: float = 1.0


def label_claims(examples: Sequence[Example], *, encoder: Encoder) -> list[LabelledClaim]:
    """The claims of all examples that have words, in order."""
    encoded = encode_pairs([(example.document, example.output) for example in examples], encoder=encoder)
    return [
        _label(claim, number, example, alone=len(claims) == 1)
        for number, (example, claims) in enumerate(zip(examples, encoded, strict=True))
        for claim in claims
        if claim.claim.words
    ]


def fit(
    network: ConsistencyNetwork,
    claims: Sequence[LabelledClaim],
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    progress: Progress = lambda _done, _of: None,
) -> None:
    """Trains the members of ``network`` in place, each in an order of its own.

    The same arguments on the same machine give the same weights.
    """
    steps = epochs * -(-len(claims) // BATCH_SIZE)
    of = steps * len(network.members)
    for number, member in enumerate(network.members):
        for step in _steps(member, claims, epochs=epochs, learning_rate=learning_rate, seed=seed + number):
            progress(number * steps + step, of)


def _steps(
    member: nn.Module, claims: Sequence[LabelledClaim], *, epochs: int, learning_rate: float, seed: int
) -> Iterator[int]:
    """Fits one network with AdamW; yields how many steps are done."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(member.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(claims) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps + 1), (steps - step) / (steps * (1 - WARM_UP) + 1))
    )
    member.train()
    step = 0
    for _ in range(epochs):
        for batch in _batches(claims, generator):
            loss = _loss(member, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(member.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            step += 1
            yield step


def _label(claim: EncodedClaim, number: int, example: Example, *, alone: bool) -> LabelledClaim:
    if example.spans is None:
        known = alone and example.unsupported is not None
        return LabelledClaim(claim, number, None, float(bool(example.unsupported)) if known else None)
    start = claim.claim.start
    words_W = np.array(
        [
            any(first < start + word.end and start + word.start < last for first, last in example.spans)
            for word in claim.claim.words
        ],
        dtype=np.float32,
    )
    return LabelledClaim(claim, number, words_W, float(words_W.any()))


def _batches(claims: Sequence[LabelledClaim], generator: random.Random) -> list[list[LabelledClaim]]:
    """A random order in which a batch's claims are of about one length, so that little is padding."""
    order = list(range(len(claims)))
    generator.shuffle(order)
    batches = []
    for first in range(0, len(order), 20 * BATCH_SIZE):
        near = sorted(order[first : first + 20 * BATCH_SIZE], key=lambda index: claims[index].encoded.pieces)
        batches += [near[start : start + BATCH_SIZE] for start in range(0, len(near), BATCH_SIZE)]
    generator.shuffle(batches)
    return [[claims[index] for index in batch] for batch in batches]


def _loss(network: nn.Module, batch: Sequence[LabelledClaim]) -> torch.Tensor:
    """Weighted mean cross-entropy over labelled words plus that over labelled claims."""
    word_logits_BW, claim_logits_B = network(make_batch([item.encoded for item in batch]))
    words_BW, known_BW = torch.zeros_like(word_logits_BW), torch.zeros_like(word_logits_BW)
    claims_B, known_B = torch.zeros_like(claim_logits_B), torch.zeros_like(claim_logits_B)
    for row, item in enumerate(batch):
        if item.words_W is not None:
            words_BW[row, : len(item.words_W)] = torch.from_numpy(item.words_W)
            known_BW[row, : len(item.words_W)] = item.weight
        if item.label is not None:
            claims_B[row] = item.label
            known_B[row] = item.weight
    word_losses_BW = binary_cross_entropy_with_logits(word_logits_BW, words_BW, reduction="none")
    claim_losses_B = binary_cross_entropy_with_logits(claim_logits_B, claims_B, reduction="none")
    return _mean(word_losses_BW, known_BW) + _mean(claim_losses_B, known_B)


def _mean(losses: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return (losses * known).sum() / known.sum().clamp(min=1e-6)
