"""BERTScore as its paper writes it down, pair by pair and word piece by word piece, for comparison."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer


@torch.inference_mode()
def plain_bertscore(
    directory: Path, pairs: Sequence[tuple[str, str]], *, references: Sequence[str] | None
) -> list[float]:
    """Zhang et al. 2020, eq. 1-4, of (output, reference), 0 to 100. ``references``: what an idf is taken over."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)
    documents = [set(tokenizer(text)["input_ids"]) for text in references or []]

    def weight(id_: int) -> float:
        if id_ in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            return 0.0
        return math.log((len(documents) + 1) / (sum(id_ in one for one in documents) + 1)) if documents else 1.0

    scores = []
    for pair in pairs:
        ids = [tokenizer(text)["input_ids"] for text in pair]
        output, reference = (model(input_ids=torch.tensor([one])).last_hidden_state[0] for one in ids)
        similar = torch.nn.functional.cosine_similarity(output[:, None], reference[None], dim=-1)
        recall_weights, precision_weights = [weight(one) for one in ids[1]], [weight(one) for one in ids[0]]
        recall = sum(w * float(similar[:, j].max()) for j, w in enumerate(recall_weights)) / sum(recall_weights)
        precision = sum(w * float(similar[i].max()) for i, w in enumerate(precision_weights)) / sum(precision_weights)
        scores.append(100 * 2 * precision * recall / (precision + recall))
    return scores
