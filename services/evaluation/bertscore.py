"""BERTScore, the overlap of an output with its reference in contextual word vectors (Zhang et al. 2020).

As the authors' package computes it, which has seen no release since 2023: special tokens can be matched but weigh
nothing, and an idf is that of the references.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.evaluation.batches import by_length, pad_right
from services.models.minilm import NAME as MINILM
from services.models.resolve import resolve_model


class BertScore:
    """F1 of the greedy matching between the last hidden states of two texts. ``longest``: tokens of a text read."""

    def __init__(self, model: Any, *, tokenizer: Any, longest: int) -> None:
        self.model, self.tokenizer, self.longest = model, tokenizer, longest

    def idf(self, references: Sequence[str]) -> dict[int, float]:
        """How much each token weighs: log((N + 1) / (n + 1)) where n of the N references have it, of any id."""
        seen = Counter(id_ for text in references for id_ in set(self._encode(text)))
        rarest = math.log(len(references) + 1)
        return defaultdict(lambda: rarest, {id_: rarest - math.log(count + 1) for id_, count in seen.items()})

    def score(
        self, pairs: Sequence[tuple[str, str]], *, weights: Mapping[int, float] | None = None
    ) -> list[float | None]:
        """Of each (output, reference), 0 to 100; None where no token of a text weighs anything, as in an empty one.

        ``weights``: of tokens, as ``idf`` gives them; without, all weigh the same.
        """
        ids = [[self._encode(text) for text in pair] for pair in pairs]
        texts = list({tuple(one): None for pair in ids for one in pair})
        states = dict(zip(texts, self._states(texts), strict=True))
        scores: list[float | None] = []
        for output, reference in ids:
            both = [(states[tuple(one)], self._weigh(one, weights)) for one in (output, reference)]
            scores.append(None if any(weights_T.sum() == 0 for _, weights_T in both) else 100 * _f1(*both))
        return scores

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text.strip(), truncation=True, max_length=self.longest, padding=False)["input_ids"])

    def _weigh(self, ids: Sequence[int], weights: Mapping[int, float] | None) -> torch.Tensor:
        # An unknown word is a word of the text, though tokenizers count its token among the special ones.
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        return torch.tensor([0.0 if id_ in special else 1.0 if weights is None else weights[id_] for id_ in ids])

    @torch.inference_mode()
    def _states(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        states: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for indices in by_length([len(ids) for ids in texts]):
            ids_BT, mask_BT = pad_right([texts[index] for index in indices], pad_id=self.tokenizer.pad_token_id or 0)
            device = self.model.device
            hidden_BTD = self.model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).last_hidden_state
            unit_BTD = torch.nn.functional.normalize(hidden_BTD.float().cpu(), dim=-1)
            for row, index in enumerate(indices):
                states[index] = unit_BTD[row, : len(texts[index])]
        return states


def _f1(output: tuple[torch.Tensor, torch.Tensor], reference: tuple[torch.Tensor, torch.Tensor]) -> float:
    (output_ID, output_I), (reference_JD, reference_J) = output, reference
    similar_IJ = output_ID @ reference_JD.T
    precision = float(similar_IJ.amax(1) @ output_I / output_I.sum())
    recall = float(similar_IJ.amax(0) @ reference_J / reference_J.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@functools.lru_cache(maxsize=1)
def load_bertscore(encoder: str, *, settings: Settings) -> BertScore:
    """With any encoder by directory, hub id, or ``all-minilm-l6-v2``. ModelNotFoundError where it cannot be had."""
    try:
        directory = resolve_model(encoder, settings=settings)
    except ModelNotFoundError as error:
        fix = f"Name a directory with an encoder, connect to the hub, or use {MINILM}, which needs none."
        raise ModelNotFoundError(error.what, fix=fix) from None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
    longest = min(int(getattr(model.config, "max_position_embeddings", 512)), int(tokenizer.model_max_length))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return BertScore(model.to(device).eval(), tokenizer=tokenizer, longest=longest)
