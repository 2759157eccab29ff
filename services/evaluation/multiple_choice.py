"""Multiple choice, as lm-evaluation-harness defines tasks and metrics.

What the model makes of each item is kept on disk by the model's content and the task, so that an interrupted benchmark
goes on where it was and a finished one is not computed again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.records import Score
from services.contract.settings import Settings
from services.datasets.choices import check_choices
from services.evaluation.calibration import measure_calibration
from services.evaluation.finite import not_finite
from services.evaluation.harness import harness_model, run_harness
from services.evaluation.model import LoadedModel
from services.evaluation.model_files import model_digest


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Where the library keeps a task, which split it is scored on, and the metric that it is told by."""

    file: str
    split: str
    metric: str = "acc_norm"


_TASKS = {
    "arc_easy": _Task(file="arc/arc_easy.yaml", split="test"),
    "arc_challenge": _Task(file="arc/arc_challenge.yaml", split="test"),
    "hellaswag": _Task(file="hellaswag/hellaswag.yaml", split="validation"),
    "openbookqa": _Task(file="openbookqa/openbookqa.yaml", split="test"),
    "commonsense_qa": _Task(file="commonsense_qa/default.yaml", split="validation", metric="acc"),
    "truthfulqa_mc1": _Task(file="truthfulqa/truthfulqa_mc1.yaml", split="validation", metric="acc"),
    "truthfulqa_mc2": _Task(file="truthfulqa/truthfulqa_mc2.yaml", split="validation", metric="acc"),
}


CALIBRATED = "commonsense_qa"
"""The benchmark that also tells how well a model is calibrated (Nguyen et al., 2025, appendix A)."""


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """A question as it was asked, and the natural log-likelihood of each choice.

    ``right`` is the place of the right one; ``value`` the item's part in the benchmark's metric, 0 to 100.
    """

    item_id: str
    question: str
    choices: tuple[str, ...]
    likelihoods: tuple[float, ...]
    right: int
    value: float


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """What a model made of a benchmark: its scores, the customary one first, and its items."""

    scores: list[Score]
    items: list[ChoiceItem]


def metrics_of(benchmark: str) -> tuple[str, ...]:
    """``acc_norm`` or ``acc``, as the benchmark is customarily told by, then what else it yields."""
    return (_TASKS[benchmark].metric, *(("wrong_nll", "ece") if benchmark == CALIBRATED else ()))


def answer_multiple_choice(
    benchmark: BenchmarkSpec,
    *,
    loaded: LoadedModel,
    directory: str,
    limit: int | None,
    batch_size: int,
    settings: Settings,
    examples: int = 0,
) -> MultipleChoice:
    """Accuracy x 100: how often the right choice has the highest log-likelihood, per character for ``acc_norm``.

    For truthfulqa_mc2 it is the probability that the true answers share among all. ``directory`` is the model's.
    ``examples`` is how many other questions are shown with their answers before each; none, and no chat template, is
    how these benchmarks are customarily reported. Data come from the hub, or from ``benchmark.path``, a file with the
    same columns; DatasetError when they cannot be had, EvaluationError for likelihoods that are not finite.
    commonsense_qa also has ``wrong_nll`` and ``ece``.
    """
    task = _TASKS[benchmark.name]
    if benchmark.path is not None:
        check_choices(benchmark)
    with _kept_responses(benchmark.name, loaded=loaded, directory=directory, settings=settings) as kept:
        model = harness_model(loaded, batch_size=batch_size, kept=kept, examples=examples)
        results = run_harness(
            benchmark, model, file=task.file, split=task.split, limit=limit, settings=settings, examples=examples
        )
    items = _items(results["samples"][benchmark.name], metric=task.metric)
    # Of NaN, argmax makes a choice.
    if not all(math.isfinite(likelihood) for item in items for likelihood in item.likelihoods):
        raise not_finite("likelihoods")
    value = 100 * float(results["results"][benchmark.name][f"{task.metric},none"])
    score = Score(benchmark=benchmark.name, metric=task.metric, value=value, items=len(items))
    return MultipleChoice(scores=[score, *_calibration(benchmark.name, items)], items=items)


def _items(samples: Sequence[Mapping[str, Any]], *, metric: str) -> list[ChoiceItem]:
    """The library's samples, in the order of the data. An item without an id of its own is named by its row."""
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    ids = [str(sample["doc"].get("id") or "") for sample in ordered]
    named = all(ids) and len(set(ids)) == len(ids)
    return [
        ChoiceItem(
            item_id=own if named else str(int(sample["doc_id"]) + 1),
            question=sample["arguments"][0][0],
            choices=(choices := tuple(argument[1].strip() for argument in sample["arguments"])),
            likelihoods=tuple(float(answer[0]) for answer in sample["filtered_resps"]),
            right=_place(sample["target"], choices),
            value=100 * float(sample[metric]),
        )
        for own, sample in zip(ids, ordered, strict=True)
    ]


def _place(target: Any, choices: Sequence[str]) -> int:
    """Tasks name the right choice by its place or by its text."""
    return choices.index(target) if isinstance(target, str) and target in choices else int(target)


def _calibration(benchmark: str, items: Sequence[ChoiceItem]) -> list[Score]:
    if benchmark != CALIBRATED:
        return []
    found = measure_calibration([item.likelihoods for item in items], [item.right for item in items])
    return [
        Score(benchmark=benchmark, metric="wrong_nll", value=found.wrong_nll, items=found.items),
        Score(benchmark=benchmark, metric="ece", value=100 * found.ece, items=found.items, higher_is_better=False),
    ]


@contextmanager
def _kept_responses(benchmark: str, *, loaded: LoadedModel, directory: str, settings: Settings) -> Iterator[Path]:
    """The file of what this model answered to the benchmark's items before; one process at a time has it."""
    folder = settings.data_dir / "evaluations" / model_digest(Path(directory))
    folder.mkdir(parents=True, exist_ok=True)
    # Requests are known by their whole text, so another version of a task asks anew.
    name = f"{benchmark}-{str(loaded.model.dtype).removeprefix('torch.')}-{loaded.window}"
    with FileLock(folder / f".{name}.lock"):
        yield folder / name
