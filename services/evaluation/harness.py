"""lm-evaluation-harness: its tasks over the hub's data or a file's, and a model that it asks for likelihoods."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from services.contract.errors import DatasetError, InvalidInputError, MissingExtraError
from services.contract.evaluation_spec import BenchmarkSpec
from services.contract.settings import Settings
from services.evaluation.model import LoadedModel
from services.models.hub import hub_reachable

log = logging.getLogger(__name__)

FEW_SHOT_SEED = 1234
"""The library's own."""


def harness_model(loaded: LoadedModel, *, batch_size: int, kept: Path, examples: int) -> Any:
    """A model for the library that answers nothing twice: ``kept`` begins the name of the file with its answers.

    Asked about more than fits into its window, the library cuts the beginning: with ``examples`` before a question
    that is InvalidInputError, for fewer would be read than were asked for; without, a warning says how often.
    """
    with _installed("multiple choice"):
        from lm_eval.api.model import CachingLM
        from lm_eval.models.huggingface import HFLM

    class Windowed(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: list[Any], *others: Any, **named: Any) -> Any:
            # The last token is predicted, not read.
            too_long = sum(len(context) + len(choice) - 1 > loaded.window for _, context, choice in requests)
            if too_long and examples:
                raise InvalidInputError(
                    f"{examples} examples and a question are more than the model's window of {loaded.window} tokens",
                    fix="Show fewer examples.",
                )
            if too_long:
                log.warning(
                    "%d of %d choices and their questions are longer than the model's window of %d tokens and were cut "
                    "at the beginning",
                    too_long,
                    len(requests),
                    loaded.window,
                )
            return super()._loglikelihood_tokens(requests, *others, **named)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = Windowed(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, max_length=loaded.window
    )
    return CachingLM(model, f"{kept}_rank0.db")


def run_harness(
    benchmark: BenchmarkSpec,
    model: Any,
    *,
    file: str,
    split: str,
    limit: int | None,
    settings: Settings,
    examples: int,
) -> dict[str, Any]:
    """What the library finds: ``results`` and ``samples`` by the benchmark's name.

    ``file`` is the library's own task, scored on ``split``. DatasetError when the data cannot be had.
    """
    with _installed(benchmark.name):
        import datasets
        import lm_eval.tasks
        from lm_eval.evaluator import evaluate
    with tempfile.TemporaryDirectory(prefix="smoothkd-task-") as scratch, _reachable_data(settings):
        library = Path(lm_eval.tasks.__file__).parent
        own = _task_file(benchmark, file=library / file, split=split, scratch=Path(scratch))
        try:
            manager = lm_eval.tasks.TaskManager(include_path=str(own.parent), include_defaults=False)
            loaded = manager.load([benchmark.name])
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DatasetError(
                f"the data of {benchmark.name} cannot be loaded: {first}",
                fix=f"Connect to the hub, or name a local file as path of the benchmark {benchmark.name}.",
            ) from None
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=examples)
            task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        # The library's simple_evaluate also describes the machine, which takes seconds, and asks git.
        results = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    assert results is not None, "this process is the only rank"
    return dict(results)


@contextmanager
def _installed(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs the package {error.name}", fix="Run pip install 'smoothkd[worker]'."
        ) from None


def _task_file(benchmark: BenchmarkSpec, *, file: Path, split: str, scratch: Path) -> Path:
    """The library's own task, which stays in its file; only where its data come from is replaced."""
    config: dict[str, Any] = {"include": str(file), "task": benchmark.name}
    if benchmark.path is not None:
        path = Path(benchmark.path).expanduser().absolute()
        config |= {
            "dataset_path": "parquet" if path.suffix == ".parquet" else "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path)}, "cache_dir": str(scratch / "cache")},
            "training_split": None,
            "validation_split": None,
            "test_split": split,
            # Of the test split the library knows that a question must not be among its own examples.
            "fewshot_split": split,
        }
    own = scratch / "tasks" / f"{benchmark.name}.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump(config), encoding="utf-8")
    return own


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
