"""Do the exact labels of a batch belong to its tokens? Asked of every batch, on the device that it is trained on.

Shape suffixes: N label positions of a batch, R those of them that the teacher tells the log-probability of the actual
token at, E the teacher's hidden size, V its vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.contract.sequences import TokenSequence
from services.contract.soft_labels import ScoredSequence, spread_positions
from services.contract.tensors import Array
from services.models.head_product import float32_product
from student_trainer.alignment import FLOAT_TOLERANCE, Found
from student_trainer.output_head import OutputHead, shape_logits
from student_trainer.targets import ExactTargets

_DEVIATIONS = 8
"""A run compares millions of positions, and must not stop at the likely extreme of so many roundings."""


def require_aligned(
    targets: ExactTargets, scored: Sequence[ScoredSequence], sequences: Sequence[TokenSequence]
) -> None:
    """LabelMismatchError where ``targets``, the labels of ``scored`` joined, give an actual token another
    log-probability than the teacher has told, beyond what rounding explains.

    Rounding: of the labels, and of the teacher's head to the type that it has here.
    """
    told = [part.token_logprobs_P for part in scored]
    positions = [np.asarray(sequence.label_positions, dtype=np.int64) for sequence in sequences]
    chosen = [spread_positions(len(own), told=len(part)) for own, part in zip(positions, told, strict=True)]
    starts = np.cumsum([0, *map(len, positions)])
    rows_R = np.concatenate([start + part for start, part in zip(starts, chosen, strict=False)])
    if not len(rows_R):
        return
    tokens_R = np.concatenate(
        [
            np.asarray(sequence.token_ids, dtype=np.int64)[own[part]]
            for sequence, own, part in zip(sequences, positions, chosen, strict=True)
        ]
    )
    device = targets.hidden_NE.device
    found_R, tolerance_R = _found(
        targets.hidden_NE[torch.from_numpy(rows_R).to(device)], torch.from_numpy(tokens_R).to(device), head=targets.head
    )
    found = Found(told_R=np.concatenate(told), found_R=found_R, tolerance_R=tolerance_R)
    worst = found.worst_mismatch()
    if worst is not None:
        owner = int(np.searchsorted(starts, rows_R[worst], side="right")) - 1
        raise found.mismatch(worst, sequences[owner], place=int(rows_R[worst] - starts[owner]))


@torch.no_grad()
def _found(hidden_RE: Tensor, tokens_R: Tensor, *, head: OutputHead) -> tuple[Array, Array]:
    """Log-probabilities of the tokens, and what rounding may have made of them, in nats."""
    weight_VE = head.weight_RD
    # Within a model's mixed precision products would be rounded to 16 bits.
    with torch.autocast(hidden_RE.device.type, enabled=False):
        products_RV = float32_product(hidden_RE.to(weight_VE.dtype), weight_VE)
        logits_RV = shape_logits(products_RV, head.bias_R, head.logit_scale, head.soft_cap, torch.float32)
        found_R = -torch.nn.functional.cross_entropy(logits_RV, tokens_R, reduction="none")
    # As in alignment.verify_token_logprobs, with the head's rounding beside that of the states.
    noise_R = torch.zeros_like(found_R)
    for row_R in (tokens_R, logits_RV.argmax(dim=1)):
        noise_R += torch.linalg.vector_norm(weight_VE[row_R].float() * hidden_RE.float(), dim=1)
    coarser = max(torch.finfo(dtype).eps for dtype in (hidden_RE.dtype, weight_VE.dtype)) / 2
    deviation = coarser * (2 / 3) ** 0.5 * abs(head.logit_scale)
    return found_R.cpu().numpy(), (FLOAT_TOLERANCE + _DEVIATIONS * deviation * noise_R).cpu().numpy()
