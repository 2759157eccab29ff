"""What a student is worth: every benchmark of a specification, item by item where there are items to look at."""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.contract.errors import CancelledError, EvaluationError, SmoothKDError
from services.contract.evaluation_spec import SUMMARISATION, BenchmarkSpec, EvaluationSpec
from services.contract.prompt import SUMMARISE
from services.contract.records import Generation, Score
from services.contract.settings import Settings
from services.datasets.reading import SummarisationItem, load_items
from services.evaluation.model import LoadedModel, load_model
from services.evaluation.multiple_choice import score_multiple_choice
from services.evaluation.rouge import rouge_l
from services.evaluation.summarisation import summarise
from services.evaluation.support import check_support
from services.models.resolve import resolve_model

log = logging.getLogger(__name__)

SUMMARY_METRICS = ("rouge_l", "support")


def evaluate(
    model: str,
    *,
    spec: EvaluationSpec,
    settings: Settings,
    known: Iterable[Generation] = (),
    on_generations: Callable[[Sequence[Generation]], None] = lambda _: None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> list[Score]:
    """The scores of a model, benchmark after benchmark in the order of ``spec``.

    Items in ``known`` are not generated again; ``on_generations`` gets the others as their batches finish, and
    ``on_progress`` the share that is done, 0 to 1. A benchmark that cannot be carried out has scores without a value,
    with the reason; EvaluationError when that is so of all of them.
    """
    loaded = load_model(resolve_model(model, settings=settings))
    by_item = {(generation.benchmark, generation.item_id): generation for generation in known}
    scores: list[Score] = []
    failures: dict[str, Exception] = {}
    for number, benchmark in enumerate(spec.benchmarks):
        steps = _steps(benchmark, spec=spec, loaded=loaded, settings=settings, known=by_item)
        try:
            while (step := _next_step(steps)).scores is None:
                # Outside of the net: what goes wrong at the caller's end is no fault of the benchmark.
                on_generations(step.generations)
                on_progress((number + step.share) / len(spec.benchmarks))
            scores += step.scores
        except _BenchmarkFailed as failed:
            failures[benchmark.name] = failed.cause
            scores += _missing_scores(benchmark, reason=_describe(failed.cause))
        on_progress((number + 1) / len(spec.benchmarks))
    if failures and len(failures) == len(spec.benchmarks):
        raise EvaluationError(
            "; ".join(f"{name}: {_describe(error)}" for name, error in failures.items()),
            fix=next((error.fix for error in failures.values() if isinstance(error, SmoothKDError)), ""),
        )
    return scores


@dataclass(frozen=True, kw_only=True)
class _Step:
    """New generations and the share of the benchmark that is done; the last step has the scores."""

    generations: Sequence[Generation] = ()
    share: float = 0.0
    scores: list[Score] | None = None


Steps = Generator[_Step, None, None]


class _BenchmarkFailed(Exception):  # noqa: N818 - carries an error, is none
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _next_step(steps: Steps) -> _Step:
    try:
        return next(steps)
    except CancelledError:
        raise
    except Exception as error:
        # Whatever it is, it must not lose the other benchmarks.
        log.warning("a benchmark could not be carried out: %s", error, exc_info=not isinstance(error, SmoothKDError))
        raise _BenchmarkFailed(error) from error


def _steps(
    benchmark: BenchmarkSpec,
    *,
    spec: EvaluationSpec,
    loaded: LoadedModel,
    settings: Settings,
    known: Mapping[tuple[str, str], Generation],
) -> Steps:
    if benchmark.name in SUMMARISATION:
        yield from _summary_steps(benchmark, spec=spec, loaded=loaded, offline=settings.offline, known=known)
    else:
        score = score_multiple_choice(
            benchmark, loaded=loaded, limit=spec.limit, batch_size=spec.batch_size, settings=settings
        )
        yield _Step(scores=[score])


def _summary_steps(
    benchmark: BenchmarkSpec,
    *,
    spec: EvaluationSpec,
    loaded: LoadedModel,
    offline: bool,
    known: Mapping[tuple[str, str], Generation],
) -> Steps:
    items = load_items(benchmark, limit=spec.limit, offline=offline)
    done: dict[str, Generation] = {}
    for item in items:
        stored = known.get((benchmark.name, item.item_id))
        if stored is not None and (stored.source, stored.reference) == (item.source, item.reference):
            done[item.item_id] = stored
    batches = summarise(
        [item for item in items if item.item_id not in done],
        loaded=loaded,
        instruction=SUMMARISE[benchmark.name],
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
    )
    for batch in batches:
        generations = [_judge(item, output, benchmark=benchmark) for item, output in batch]
        done |= {generation.item_id: generation for generation in generations}
        yield _Step(generations=generations, share=len(done) / len(items))
    yield _Step(scores=[_mean(metric, list(done.values()), benchmark=benchmark) for metric in SUMMARY_METRICS])


def _judge(item: SummarisationItem, output: str, *, benchmark: BenchmarkSpec) -> Generation:
    support = check_support(output, source=item.source)
    scores = {"rouge_l": rouge_l(output, reference=item.reference)}
    if support.share is not None:
        scores["support"] = support.share
    return Generation(
        benchmark=benchmark.name,
        item_id=item.item_id,
        source=item.source,
        reference=item.reference,
        output=output,
        scores=scores,
        spans=support.spans,
    )


def _mean(metric: str, generations: Sequence[Generation], *, benchmark: BenchmarkSpec) -> Score:
    """Over the items that have the metric; how many those are is part of the score."""
    values = [generation.scores[metric] for generation in generations if metric in generation.scores]
    if len(values) < len(generations):
        log.warning(
            "%s: %d of %d outputs have no %s, because they are empty or say nothing that could be looked up",
            benchmark.name,
            len(generations) - len(values),
            len(generations),
            metric,
        )
    if not values:
        missing = "every output is empty or says nothing that could be looked up"
        return Score(benchmark=benchmark.name, metric=metric, value=None, missing=missing, items=0)
    return Score(benchmark=benchmark.name, metric=metric, value=sum(values) / len(values), items=len(values))


def _missing_scores(benchmark: BenchmarkSpec, *, reason: str) -> list[Score]:
    metrics = SUMMARY_METRICS if benchmark.name in SUMMARISATION else ("acc_norm",)
    return [Score(benchmark=benchmark.name, metric=name, value=None, missing=reason, items=0) for name in metrics]


def _describe(error: Exception) -> str:
    if isinstance(error, SmoothKDError):
        return error.what
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
