"""The lens: a logistic regression over lookback ratios that tells factual spans from hallucinated ones.

A span's features are its tokens' ratios, averaged, one per attention head, layer by layer (Chuang et al. 2024,
section 2). Spans are given, or windows of eight tokens that slide over the summary one token at a time.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.contract.errors import InvalidInputError
from services.evaluation.lookback.examples import INSTRUCTION, Characters
from services.evaluation.lookback.fingerprint import ModelFingerprint
from services.evaluation.lookback.shipped import SHIPPED

WINDOW = 8
LLAMA_2_7B = ModelFingerprint(
    architecture={"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096},
    weights=None,
)

Array = NDArray[np.float32]


class Lens(BaseModel):
    """``coef`` holds one coefficient per head, layer-major. A span is factual from ``threshold`` on.

    ``training`` tells how the lens came about and how well it does on documents that it was not trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["smoothkd-lens-1"] = "smoothkd-lens-1"
    model: str
    fingerprint: ModelFingerprint
    instruction: str = INSTRUCTION
    spans: Literal["windows", "predefined"] = "windows"
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    threshold: float = Field(default=0.5, ge=0, le=1)
    intercept: float
    coef: list[float]
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_coefficient_per_head(self) -> "Lens":
        if len(self.coef) != self.layers * self.heads:
            raise ValueError(f"{len(self.coef)} coefficients for {self.layers} layers of {self.heads} heads")
        return self

    @property
    def digest(self) -> str:
        """Equal for lenses that judge alike, wherever they lie and however they came about."""
        return hashlib.sha256(self.model_dump_json(exclude={"training", "model"}).encode()).hexdigest()

    def probabilities(self, features_NF: Array) -> Array:
        """That each span is factual, from its mean ratios, layer-major, (N,)."""
        logits_N: NDArray[np.float64] = features_NF.astype(np.float64) @ np.array(self.coef) + self.intercept
        factual_N: Array = (0.5 * (1 + np.tanh(logits_N / 2))).astype(np.float32)
        return factual_N

    def check_model(self, name: str, fingerprint: ModelFingerprint) -> str:
        """How the model relates to the lens's own: ``same``, ``fine-tuned``, or ``architecture`` where weights cannot
        be compared. InvalidInputError for another model."""
        relation = self.fingerprint.relation(fingerprint)
        if relation is None:
            own = ", ".join(f"{key} {value}" for key, value in self.fingerprint.architecture.items())
            theirs = ", ".join(f"{key} {value}" for key, value in fingerprint.architecture.items())
            difference = (
                "its weights come from another pre-training" if own == theirs else f"it has {theirs}, not {own}"
            )
            raise InvalidInputError(
                f"the lens belongs to {self.model} and models fine-tuned from it; {name} is another: {difference}",
                fix="Train a lens for it with `smoothkd lens train`, or name the lens's own model.",
                details={"lens_model": self.model, "model": name},
            )
        return relation


@dataclass(frozen=True, kw_only=True)
class SpanScore:
    """Characters of a summary, its tokens [first, after), and the probability that it is factual."""

    characters: Characters
    first: int
    after: int
    factual: float


def load_lens(source: str | Path) -> Lens:
    """A lens by file, or a shipped one by its model's short name.

    The published classifiers for Llama-2-7B-chat, saved as JSON with coef, intercept, classes and best_threshold, are
    adapted. InvalidInputError says what is wrong with a file.
    """
    path = SHIPPED.get(str(source), Path(source))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(SHIPPED)
        raise InvalidInputError(
            f"the lens {source} cannot be read: {error}", fix=f"Name a file that lens training wrote, or {known}."
        ) from None
    try:
        if '"best_threshold"' in text:
            return _adapt(_Published.model_validate_json(text), path.name)
        return Lens.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(
            f"{path} is not a lens: {where + ': ' if where else ''}{first['msg']}",
            fix="Train it anew.",
        ) from None


class _Published(BaseModel):
    """A classifier as its authors published it; class 1 is factual."""

    coef: list[float] = Field(min_length=1024, max_length=1024)
    intercept: float
    classes: list[int]
    best_threshold: float


def _adapt(published: _Published, name: str) -> Lens:
    sign = 1 if published.classes[-1] == 1 else -1
    return Lens(
        model="meta-llama/Llama-2-7b-chat-hf",
        fingerprint=LLAMA_2_7B,
        spans="predefined" if "predefined_span" in name else "windows",
        layers=32,
        heads=32,
        threshold=published.best_threshold,
        intercept=sign * published.intercept,
        coef=[sign * value for value in published.coef],
        training={"source": name, "paper": "Chuang et al. 2024, Lookback Lens"},
    )


def score_windows(
    lens: Lens, ratios_TLH: Array, *, offsets: Sequence[Characters], window: int = WINDOW
) -> list[SpanScore]:
    """Every window of ``window`` tokens; one shorter window where the summary is shorter."""
    return _score(lens, ratios_TLH, window_ranges(len(ratios_TLH), window=window), offsets)


def score_spans(
    lens: Lens, ratios_TLH: Array, *, offsets: Sequence[Characters], spans: Sequence[Characters]
) -> list[SpanScore]:
    """The given characters, each as the tokens that it touches. InvalidInputError for one that touches none."""
    ranges = []
    for start, end in spans:
        touched = [index for index, (first, after) in enumerate(offsets) if first < end and start < after]
        if not touched:
            raise InvalidInputError(
                f"the characters {start} to {end} hold no token of the summary", fix="Give spans that hold text."
            )
        ranges.append((touched[0], touched[-1] + 1))
    return _score(lens, ratios_TLH, ranges, offsets)


def factual_rate(scores: Sequence[SpanScore], *, threshold: float) -> float | None:
    """Share of spans judged factual, 0 to 100; None without spans."""
    if not scores:
        return None
    return 100 * sum(score.factual >= threshold for score in scores) / len(scores)


def token_scores(scores: Sequence[SpanScore], *, tokens: int) -> list[float]:
    """For each token the mean probability that a span around it is hallucinated; nan outside of every span."""
    sums, counts = [0.0] * tokens, [0] * tokens
    for score in scores:
        for token in range(score.first, score.after):
            sums[token] += 1 - score.factual
            counts[token] += 1
    return [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]


def summary_score(scores: Sequence[SpanScore]) -> float:
    """How likely a summary with these windows holds a hallucination, 0 to 1."""
    return float(np.mean([1 - score.factual for score in scores]))


def window_ranges(tokens: int, *, window: int = WINDOW) -> list[tuple[int, int]]:
    """Token ranges [first, after) of all windows; one over everything where there are fewer tokens."""
    width = min(window, tokens)
    return [(start, start + width) for start in range(tokens - width + 1)]


def mean_ratios(ratios_TLH: Array, ranges: Sequence[tuple[int, int]]) -> Array:
    """Mean ratios of token ranges [first, after), layer-major, (N, L*H)."""
    flat_TF = ratios_TLH.reshape(len(ratios_TLH), -1)
    return np.stack([flat_TF[first:after].mean(axis=0) for first, after in ranges])


def _score(
    lens: Lens, ratios_TLH: Array, ranges: list[tuple[int, int]], offsets: Sequence[Characters]
) -> list[SpanScore]:
    if not ranges:
        return []
    if ratios_TLH.shape[1:] != (lens.layers, lens.heads):
        raise InvalidInputError(
            f"the lens has {lens.layers} layers of {lens.heads} heads, the ratios have {ratios_TLH.shape[1:]}",
            fix="Measure the ratios with the lens's own model.",
        )
    factual_N = lens.probabilities(mean_ratios(ratios_TLH, ranges))
    return [
        SpanScore(
            characters=(offsets[first][0], offsets[after - 1][1]), first=first, after=after, factual=float(probability)
        )
        for (first, after), probability in zip(ranges, factual_N, strict=True)
    ]
