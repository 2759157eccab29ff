"""Claims with their encoder states as padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.evaluation.consistency.claims import FEATURES, Claim, Source, read_claims
from services.evaluation.consistency.encoding import HIDDEN, EncodedSentence, Encoder, Text
from services.evaluation.consistency.network import Batch
from services.evaluation.consistency.text import split_sentences

MAX_PASSAGE_PIECES = 192


@dataclass(slots=True)
class EncodedClaim:
    """A claim, its own states and those of the sentences of its passage, in order."""

    claim: Claim
    sentence: EncodedSentence
    passage: list[EncodedSentence]

    @property
    def pieces(self) -> int:
        return len(self.sentence.word_of_piece) + sum(len(part.word_of_piece) for part in self.passage)


def encode_pairs(pairs: Sequence[tuple[str, str]], *, encoder: Encoder) -> list[list[EncodedClaim]]:
    """The claims of each (document, output), in order; a document of several outputs is read once."""
    documents = list(dict.fromkeys(document for document, _ in pairs))
    sources = {document: Source(document) for document in documents}
    claims = [read_claims(output, source=sources[document]) for document, output in pairs]
    wanted: dict[str, set[int]] = {document: set() for document in documents}
    for (document, _), found in zip(pairs, claims, strict=True):
        wanted[document].update(index for claim in found for index in claim.passage)
    texts = [Text(sources[document].sentences, sources[document].words, wanted[document]) for document in documents]
    for (_, output), found in zip(pairs, claims, strict=True):
        sentences = [output[start:end] for start, end in split_sentences(output)]
        texts.append(Text(sentences, [claim.words for claim in found], set(range(len(sentences)))))
    states = encoder.encode(texts)
    of_document = dict(zip(documents, states, strict=False))
    return [
        [
            EncodedClaim(claim, of_output[claim.index], [of_document[document][index] for index in claim.passage])
            for claim in found
        ]
        for (document, _), found, of_output in zip(pairs, claims, states[len(documents) :], strict=True)
    ]


def make_batch(claims: Sequence[EncodedClaim]) -> Batch:
    """``claims`` padded to the longest of them; a claim whose source is empty gets one zero state as its passage."""
    pieces = max(1, *(len(item.sentence.word_of_piece) for item in claims))
    passages = [_passage(item) for item in claims]
    longest = max(len(states) for states in passages)
    words = max(1, *(len(item.claim.words) for item in claims))
    claim_BCD = torch.zeros(len(claims), pieces, HIDDEN)
    passage_BPD = torch.zeros(len(claims), longest, HIDDEN)
    claim_mask_BC = torch.zeros(len(claims), pieces, dtype=torch.bool)
    passage_mask_BP = torch.zeros(len(claims), longest, dtype=torch.bool)
    pool_BWC = np.zeros((len(claims), words, pieces), dtype=np.float32)
    words_BW = torch.zeros(len(claims), words, dtype=torch.bool)
    features_BWF = torch.zeros(len(claims), words, len(FEATURES))
    for row, (item, states_PD) in enumerate(zip(claims, passages, strict=True)):
        own = len(item.sentence.word_of_piece)
        claim_BCD[row, :own] = item.sentence.states_TD.float()
        claim_mask_BC[row, :own] = True
        passage_BPD[row, : len(states_PD)] = states_PD.float()
        passage_mask_BP[row, : len(states_PD)] = True
        words_BW[row, : len(item.claim.words)] = True
        features_BWF[row, : len(item.claim.words)] = torch.from_numpy(item.claim.features_WF)
        for piece, word in enumerate(item.sentence.word_of_piece):
            if word >= 0:
                pool_BWC[row, word, piece] = 1.0
    pool_BWC /= np.maximum(pool_BWC.sum(-1, keepdims=True), 1.0)
    return Batch(
        claim_BCD, passage_BPD, claim_mask_BC, passage_mask_BP, torch.from_numpy(pool_BWC), words_BW, features_BWF
    )


def by_length(claims: Sequence[EncodedClaim], *, size: int) -> list[list[int]]:
    """Indices in batches of claims of about one length."""
    order = sorted(range(len(claims)), key=lambda index: (claims[index].pieces, index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _passage(item: EncodedClaim) -> torch.Tensor:
    if not item.passage:
        return torch.zeros(1, HIDDEN, dtype=torch.float16)
    return torch.cat([part.states_TD for part in item.passage])[:MAX_PASSAGE_PIECES]
