"""Multiple choice, as lm-evaluation-harness defines tasks and metrics.

What the model makes of each item is kept on disk by the model's content and the task, so that an interrupted benchmark
goes on where it was and a finished one is not computed again.
"""

import logging
import tempfile
from collections.abc import Iterator
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


def metric_of(benchmark: str) -> str:
    """``acc_norm`` or ``acc``, as the benchmark is customarily told by."""
    return _TASKS[benchmark].metric


def score_multiple_choice(
    benchmark: BenchmarkSpec,
    *,
    loaded: LoadedModel,
    directory: str,
    limit: int | None,
    batch_size: int,
    settings: Settings,
) -> Score:
    """Accuracy x 100: how often the right choice has the highest log-likelihood, per character for ``acc_norm``.

    For truthfulqa_mc2 it is the probability that the true answers share among all. ``directory`` is the model's.

    No examples are shown and no chat template is applied, as these benchmarks are customarily reported. Data come from
    the hub, or from ``benchmark.path``, a file with the same columns; DatasetError when they cannot be had.
    """
    task = _TASKS[benchmark.name]
    if benchmark.path is not None:
        _check_columns(benchmark, task)
    with _kept_responses(benchmark.name, loaded=loaded, directory=directory, settings=settings) as kept:
        results = _run_harness(
            benchmark, task, loaded=loaded, limit=limit, batch_size=batch_size, settings=settings, kept=kept
        )
    return Score(
        benchmark=benchmark.name,
        metric=task.metric,
        value=100 * float(results["results"][benchmark.name][f"{task.metric},none"]),
        items=int(results["n-samples"][benchmark.name]["effective"]),
    )


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
            log_samples=False,
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
            "test_split": None,
            f"{task.split}_split": task.split,
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
