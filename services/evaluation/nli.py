"""Any NLI cross-encoder as a judge: is each sentence of an output entailed by some part of its source?

As SummaC's zero-shot variant (Laban et al. 2022): the highest probability of entailment over parts of the source for
each sentence, and the mean over sentences. The parts are windows of whole source sentences.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from services.contract.errors import InvalidInputError, ModelNotFoundError
from services.contract.settings import Settings
from services.evaluation.batches import by_length
from services.evaluation.consistency.text import split_sentences
from services.evaluation.sentences import sentence_spans
from services.evaluation.verdict import Verdict
from services.models.loading import load_whole
from services.models.resolve import resolve_model

DETECTOR = "nli"
WINDOW_TOKENS = 256
"""Of the source in one window: these models are trained on premises of a few sentences."""


class NliJudge:
    """A cross-encoder with its label of entailment. ``longest``: tokens that it reads at once."""

    def __init__(self, model: Any, *, tokenizer: Any, entailment: int, longest: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.entailment = entailment
        self.longest = longest

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Of each (document, output), in order; no score for an output without words."""
        sentences = [split_sentences(output) for _, output in pairs]
        windows = {document: self._windows(document) for document, _ in pairs}
        asked = [
            (window, output[start:end])
            for (document, output), found in zip(pairs, sentences, strict=True)
            for start, end in found
            for window in windows[document]
        ]
        entailed = iter(self.entailed(asked))
        verdicts = []
        for (document, _), found in zip(pairs, sentences, strict=True):
            supported = [max((next(entailed) for _ in windows[document]), default=0.0) for _ in found]
            score = 100 * sum(supported) / len(supported) if supported else None
            spans = sentence_spans(found, supported, detector=DETECTOR, explain=_explain(supported))
            verdicts.append(Verdict(score=score, spans=spans))
        return verdicts

    @torch.inference_mode()
    def entailed(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Probability that each (premise, hypothesis) is an entailment; a premise that is too long loses its end."""
        rows = [self._encode(premise, hypothesis) for premise, hypothesis in pairs]
        scores = [0.0] * len(rows)
        for indices in by_length([len(row["input_ids"]) for row in rows]):
            batch = self.tokenizer.pad([rows[index] for index in indices], return_tensors="pt").to(self.model.device)
            probabilities_B = self.model(**batch).logits.float().softmax(-1)[:, self.entailment]
            for index, probability in zip(indices, probabilities_B.tolist(), strict=True):
                scores[index] = probability
        return scores

    def _encode(self, premise: str, hypothesis: str) -> Any:
        # Only the longer of the two gives way, so that the hypothesis stays whole unless it alone is too long.
        return self.tokenizer(premise, hypothesis, truncation="longest_first", max_length=self.longest)

    def _token_ids(self, text: str) -> list[int]:
        # Not verbose: it warns of texts that are longer than the model reads, and these are cut up later.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _windows(self, document: str) -> list[str]:
        """Runs of whole sentences of up to WINDOW_TOKENS tokens; each begins with the last sentence of the one before.

        That way no two neighbouring sentences are ever apart.
        """
        ranges = split_sentences(document)
        limit = min(WINDOW_TOKENS, self.longest // 2)
        counts = [len(self._token_ids(document[start:end])) for start, end in ranges]
        windows = []
        first = 0
        while first < len(ranges):
            after, total = first + 1, counts[first]
            while after < len(ranges) and total + counts[after] <= limit:
                total += counts[after]
                after += 1
            windows.append(document[ranges[first][0] : ranges[after - 1][1]])
            if after == len(ranges):
                break
            first = after - 1 if after - 1 > first else after
        return windows


@functools.lru_cache(maxsize=1)
def load_nli(name: str, *, settings: Settings) -> NliJudge:
    """A cross-encoder by directory or hub id. InvalidInputError for a model whose labels hold no entailment."""
    try:
        directory = resolve_model(name, settings=settings)
    except ModelNotFoundError as error:
        fix = "Name a directory with a cross-encoder, connect to the hub, or use consistency, which needs none."
        raise ModelNotFoundError(error.what, fix=fix) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"{name} cannot be loaded as a cross-encoder: {first}", fix="Name an NLI model for sequence classification."
        ) from None
    labels = {str(label).lower(): int(index) for index, label in config.id2label.items()}
    entailment = next((index for label, index in labels.items() if label in ("entailment", "entail")), None)
    if entailment is None:
        raise InvalidInputError(
            f"{name} has no label of entailment; its labels are {', '.join(labels)}",
            fix="Name a model that was trained for natural language inference.",
        )
    model = load_whole(AutoModelForSequenceClassification, directory, role="a cross-encoder")
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 512)
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        # These keep the first positions for padding.
        positions -= model.config.pad_token_id + 1
    longest = min(positions, int(tokenizer.model_max_length))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return NliJudge(model.to(device).eval(), tokenizer=tokenizer, entailment=entailment, longest=longest)


def _explain(supported: Sequence[float]) -> Callable[[int], str]:
    return lambda index: f"No part of the source entails this sentence with more than {supported[index]:.0%}."
