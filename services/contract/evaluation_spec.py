"""What every trained student is measured on: benchmarks, metrics, and the models that judge."""

import operator
from collections import Counter
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

BenchmarkName = Literal[
    "demo_news",
    "cnn_dailymail",
    "xsum",
    "hotpotqa",
    "arc_challenge",
    "arc_easy",
    "hellaswag",
    "openbookqa",
    "commonsense_qa",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
]
SUMMARISATION: frozenset[str] = frozenset({"demo_news", "cnn_dailymail", "xsum"})
QUESTIONS: frozenset[str] = frozenset({"hotpotqa"})
"""Questions about a given context, answered in words."""
MULTIPLE_CHOICE: frozenset[str] = frozenset(get_args(BenchmarkName)) - SUMMARISATION - QUESTIONS

MetricName = Literal[
    "rouge_l",
    "support",
    "consistency",
    "factual_rate",
    "factual_consistency",
    "entailment",
    "chrf",
    "meteor",
    "meteor_exact_stem",
    "bertscore",
    "self_consistency",
]
"""What summaries are measured by. The first four are cheap; the others ask for a model, samples or more time."""


class Spec(BaseModel):
    """What all specifications share: frozen, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BenchmarkSpec(Spec):
    """One benchmark by name; ``path`` replaces its data with a local .jsonl or .parquet file of the same columns."""

    name: BenchmarkName
    path: str | None = None


class JudgeSpec(Spec):
    """Which models judge outputs, each a directory or a hub id.

    ``lens`` is a file of ``smoothkd lens train`` or a shipped lens's name; None takes the shipped one that fits the
    model under evaluation. ``hhem`` judges factual_consistency, ``nli`` (a cross-encoder with an entailment label)
    entailment, and ``encoder`` makes the word vectors of bertscore; with ``idf`` it weighs words by how few of the
    benchmark's references, of the items under evaluation, have them.
    """

    lens: str | None = None
    hhem: Annotated[str, Field(min_length=1)] = "vectara/hallucination_evaluation_model"
    nli: Annotated[str, Field(min_length=1)] | None = None
    encoder: Annotated[str, Field(min_length=1)] = "all-minilm-l6-v2"
    # Not written down where it is off, so that runs keep the keys that they had before there was a choice.
    idf: Annotated[bool, Field(exclude_if=operator.not_)] = False


def _named_benchmark(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class EvaluationSpec(Spec):
    """What every trained student is measured on. ``limit`` keeps the first items of each benchmark.

    ``metrics`` are those of summaries. ``samples``: how many further summaries are drawn at temperature 1 for
    self_consistency.
    """

    benchmarks: tuple[Annotated[BenchmarkSpec, BeforeValidator(_named_benchmark)], ...] = ()
    limit: Annotated[int, Field(ge=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    batch_size: Annotated[int, Field(ge=1)] = 8
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = (
        "rouge_l",
        "support",
        "consistency",
        "factual_rate",
    )
    judges: JudgeSpec = JudgeSpec()
    samples: Annotated[int, Field(ge=0, le=100)] = 0

    @model_validator(mode="after")
    def _holds_together(self) -> "EvaluationSpec":
        _check_once(tuple(benchmark.name for benchmark in self.benchmarks))
        _check_once(self.metrics)
        if "self_consistency" in self.metrics and self.samples == 0:
            raise ValueError("metric self_consistency compares samples; set samples, for example to 5")
        if self.samples and "self_consistency" not in self.metrics:
            raise ValueError("samples only serve the metric self_consistency; add it to metrics, or remove samples")
        if "entailment" in self.metrics and self.judges.nli is None:
            raise ValueError("metric entailment needs an NLI cross-encoder; name one under judges.nli")
        if self.judges.idf and "bertscore" not in self.metrics:
            raise ValueError("judges.idf only serves the metric bertscore; add it to metrics, or remove idf")
        return self


def _check_once(names: tuple[str, ...]) -> None:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"lists {', '.join(repeated)} more than once; list each value once")
