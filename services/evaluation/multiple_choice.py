"""Multiple choice, as lm-evaluation-harness defines tasks and metrics.

What the model makes of each item is kept on disk by the model's content and the task, so that an interrupted benchmark
goes on where it was and a finished one is not computed again.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from services.contract.errors import DatasetError, MissingExtraError
from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.records import Score
from services.contract.settings import Settings
from services.datasets.sources import local_rows
from services.evaluation.calibration import measure_calibration
from services.evaluation.model import LoadedModel
from services.evaluation.model_files import model_digest
from services.models.hub import hub_reachable


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Where the library keeps a task, which split it is scored on, the columns of its data, and what it is told by."""

    file: str
    split: str
    columns: tuple[str, ...]
    metric: str = "acc_norm"


_TASKS = {
    "arc_easy": _Task(file="arc/arc_easy.yaml", split="test", columns=("question", "choices", "answerKey")),
    "arc_challenge": _Task(file="arc/arc_challenge.yaml", split="test", columns=("question", "choices", "answerKey")),
    "hellaswag": _Task(
        file="hellaswag/hellaswag.yaml",
        split="validation",
        columns=("ctx_a", "ctx_b", "activity_label", "endings", "label"),
    ),
    "openbookqa": _Task(
        file="openbookqa/openbookqa.yaml", split="test", columns=("question_stem", "choices", "answerKey")
    ),
    "commonsense_qa": _Task(
        file="commonsense_qa/default.yaml",
        split="validation",
        columns=("question", "choices", "answerKey"),
        metric="acc",
    ),
    "truthfulqa_mc1": _Task(
        file="truthfulqa/truthfulqa_mc1.yaml", split="validation", columns=("question", "mc1_targets"), metric="acc"
    ),
    "truthfulqa_mc2": _Task(
        file="truthfulqa/truthfulqa_mc2.yaml", split="validation", columns=("question", "mc2_targets"), metric="acc"
    ),
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
    same columns; DatasetError when they cannot be had. commonsense_qa also has ``wrong_nll`` and ``ece``.
    """
    task = _TASKS[benchmark.name]
    if benchmark.path is not None:
        _check_columns(benchmark, task)
    with _kept_responses(benchmark.name, loaded=loaded, directory=directory, settings=settings) as kept:
        results = _run_harness(
            benchmark,
            task,
            loaded=loaded,
            limit=limit,
            batch_size=batch_size,
            settings=settings,
            kept=kept,
            examples=examples,
        )
    items = _items(results["samples"][benchmark.name], metric=task.metric)
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


def _check_columns(benchmark: BenchmarkSpec, task: _Task) -> None:
    assert benchmark.path is not None
    empty = True
    for row in local_rows(Path(benchmark.path).expanduser()):
        empty = False
        missing = [column for column in task.columns if row.values.get(column) is None]
        if missing:
            raise DatasetError(
                f"{row.place}: no column {', '.join(map(repr, missing))}; {benchmark.name} needs "
                f"{', '.join(map(repr, task.columns))}",
                fix="Use a file with the columns that the data set has on the hub.",
            )
    if empty:
        raise DatasetError(f"{benchmark.path} holds no item", fix="Name a file with at least one item.")


def _run_harness(
    benchmark: BenchmarkSpec,
    task: _Task,
    *,
    loaded: LoadedModel,
    limit: int | None,
    batch_size: int,
    settings: Settings,
    kept: Path,
    examples: int,
) -> dict[str, Any]:
    try:
        import datasets
        import lm_eval.tasks
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingExtraError(
            f"{benchmark.name} needs the package {error.name}", fix="Run pip install 'smoothkd[worker]'."
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, max_length=loaded.window)
    with tempfile.TemporaryDirectory(prefix="smoothkd-task-") as scratch, _reachable_data(settings):
        own = _task_file(benchmark, task, scratch=Path(scratch), library=Path(lm_eval.tasks.__file__).parent)
        try:
            manager = lm_eval.tasks.TaskManager(include_path=str(own.parent), include_defaults=False)
            loaded_tasks = list(manager.load([benchmark.name])["tasks"].values())
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DatasetError(
                f"the data of {benchmark.name} cannot be loaded: {first}",
                fix=f"Connect to the hub, or name a local file as path of the benchmark {benchmark.name}.",
            ) from None
        results = simple_evaluate(
            model,
            tasks=loaded_tasks,
            limit=limit,
            bootstrap_iters=0,
            num_fewshot=examples,
            log_samples=True,
            task_manager=manager,
            use_cache=str(kept),
        )
    assert results is not None, "this process is the only rank"
    return dict(results)


def _task_file(benchmark: BenchmarkSpec, task: _Task, *, scratch: Path, library: Path) -> Path:
    """The library's own task, which stays in its file; only where its data come from is replaced."""
    config: dict[str, Any] = {"include": str(library / task.file), "task": benchmark.name}
    if benchmark.path is not None:
        path = Path(benchmark.path).expanduser().absolute()
        config |= {
            "dataset_path": "parquet" if path.suffix == ".parquet" else "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {task.split: str(path)}, "cache_dir": str(scratch / "cache")},
            "training_split": None,
            "validation_split": None,
            "test_split": task.split,
            # Of the test split the library knows that a question must not be among its own examples.
            "fewshot_split": task.split,
        }
    own = scratch / "tasks" / f"{benchmark.name}.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump(config), encoding="utf-8")
    return own


@contextmanager
def _kept_responses(benchmark: str, *, loaded: LoadedModel, directory: str, settings: Settings) -> Iterator[Path]:
    """The file of what this model answered to the benchmark's items before; one process at a time has it."""
    folder = settings.data_dir / "evaluations" / model_digest(Path(directory))
    folder.mkdir(parents=True, exist_ok=True)
    # Requests are known by their whole text, so another version of a task asks anew.
    name = f"{benchmark}-{str(loaded.model.dtype).removeprefix('torch.')}-{loaded.window}"
    with FileLock(folder / f".{name}.lock"):
        yield folder / name


@contextmanager
def _reachable_data(settings: Settings) -> Iterator[None]:
    """Without a hub, the data library looks into its cache at once instead of asking for half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub_reachable(settings)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
