"""The trained part of the consistency model: a small transformer over a claim's and its passage's encoder states.

Shapes: B claims, C and P word pieces of claim and passage, T = C + P, W words of a claim, D encoder states, F lexical
features, A alignment features, H width, M members.
"""

from dataclasses import dataclass

import torch
from torch import nn

from services.evaluation.consistency.claims import FEATURES
from services.evaluation.consistency.encoding import HIDDEN, LAYERS

WIDTH = 64
DEPTH = 1
MEMBERS = 3
ALIGNMENTS = 3 * len(LAYERS)
PADDING_LOGIT = -30.0


@dataclass(frozen=True, slots=True)
class Batch:
    """``pool_BWC`` averages the pieces of each word; the masks are True for what is not padding."""

    claim_BCD: torch.Tensor
    passage_BPD: torch.Tensor
    claim_mask_BC: torch.Tensor
    passage_mask_BP: torch.Tensor
    pool_BWC: torch.Tensor
    words_BW: torch.Tensor
    features_BWF: torch.Tensor


class ConsistencyNetwork(nn.Module):
    """The mean logits of networks fitted apart: what one of them learnt by chance weighs less."""

    def __init__(self, *, members: int = MEMBERS) -> None:
        super().__init__()
        self.members = nn.ModuleList(Member() for _ in range(members))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Word logits (B, W), padding words at PADDING_LOGIT, and claim logits (B)."""
        logits = [member(batch) for member in self.members]
        words_MBW, claims_MB = (torch.stack(kind) for kind in zip(*logits, strict=True))
        return words_MBW.mean(0), claims_MB.mean(0)


class Member(nn.Module):
    """Logits that words, and the claim as a whole, are unsupported by the passage."""

    def __init__(self) -> None:
        super().__init__()
        evidence = len(FEATURES) + ALIGNMENTS
        self.project = nn.Linear(HIDDEN, WIDTH)
        self.evidence = nn.Linear(evidence, WIDTH)
        self.side = nn.Parameter(torch.zeros(2, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.word_layer = nn.Sequential(nn.Linear(WIDTH + evidence, 64), nn.GELU(), nn.Dropout(0.1))
        self.word_head = nn.Linear(64, 1)
        self.claim_layer = nn.Sequential(nn.Linear(2 * 64 + evidence, 64), nn.GELU(), nn.Dropout(0.1))
        self.claim_head = nn.Linear(64, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Word logits (B, W), padding words at PADDING_LOGIT, and claim logits (B)."""
        words_BWC = batch.pool_BWC
        evidence_BWE = torch.cat([batch.features_BWF, words_BWC @ _alignments(batch)], dim=-1)
        of_piece_BCW = (words_BWC > 0).to(evidence_BWE.dtype).transpose(1, 2)
        claim_BCH = self.project(batch.claim_BCD) + of_piece_BCW @ self.evidence(evidence_BWE) + self.side[0]
        passage_BPH = self.project(batch.passage_BPD) + self.side[1]
        mask_BT = torch.cat([batch.claim_mask_BC, batch.passage_mask_BP], dim=1)
        both_BTH = self.layers(torch.cat([claim_BCH, passage_BPH], dim=1), src_key_padding_mask=~mask_BT)
        read_BWH = words_BWC @ both_BTH[:, : claim_BCH.shape[1]]
        states_BWH = self.word_layer(torch.cat([read_BWH, evidence_BWE], dim=-1))
        word_logits_BW = self.word_head(states_BWH).squeeze(-1).masked_fill(~batch.words_BW, PADDING_LOGIT)
        real_BW1 = batch.words_BW.unsqueeze(-1)
        count_B1 = real_BW1.sum(1).clamp(min=1)
        mean_BH = (states_BWH * real_BW1).sum(1) / count_B1
        most_BH = states_BWH.masked_fill(~real_BW1, PADDING_LOGIT).amax(1)
        evidence_BE = (evidence_BWE * real_BW1).sum(1) / count_B1
        claims_BH = self.claim_layer(torch.cat([mean_BH, most_BH, evidence_BE], dim=-1))
        return word_logits_BW, self.claim_head(claims_BH).squeeze(-1)


def _alignments(batch: Batch) -> torch.Tensor:
    """For each claim piece and layer (B, C, A): the cosine to its best source piece, and to those beside that.

    A word that stands in the source beside other words than in the claim aligns well itself, but its neighbours do
    not align with its counterpart's neighbours.
    """
    columns = []
    for claim_BCD, passage_BPD in zip(
        batch.claim_BCD.chunk(len(LAYERS), -1), batch.passage_BPD.chunk(len(LAYERS), -1), strict=True
    ):
        cosine_BCP = nn.functional.normalize(claim_BCD, dim=-1) @ nn.functional.normalize(
            passage_BPD, dim=-1
        ).transpose(1, 2)
        cosine_BCP = cosine_BCP.masked_fill(~batch.passage_mask_BP[:, None, :], 0.0)
        best_BC, place_BC = cosine_BCP.max(-1)
        last = cosine_BCP.shape[-1] - 1
        before_BC = _at(cosine_BCP.roll(1, 1), (place_BC - 1).clamp(min=0))
        after_BC = _at(cosine_BCP.roll(-1, 1), (place_BC + 1).clamp(max=last))
        columns += [best_BC, before_BC, after_BC]
    return torch.stack(columns, dim=-1)


def _at(values_BCP: torch.Tensor, place_BC: torch.Tensor) -> torch.Tensor:
    return values_BCP.gather(-1, place_BC.unsqueeze(-1)).squeeze(-1)
