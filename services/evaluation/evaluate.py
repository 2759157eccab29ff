"""What a student is worth: every benchmark of a specification, item by item where there are items to look at."""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.contract.errors import CancelledError, EvaluationError, SmoothKDError
from services.contract.evaluation_spec import MULTIPLE_CHOICE, QUESTIONS, BenchmarkSpec, EvaluationSpec
from services.contract.prompt import SUMMARISE
from services.contract.records import Generation, Score
from services.contract.settings import Settings
from services.datasets.questions import load_questions
from services.datasets.reading import load_items
from services.evaluation.answering import Request
from services.evaluation.calibration import wrong_nll
from services.evaluation.items import answer_items, mean_score
from services.evaluation.judged import judged_by
from services.evaluation.lookback.fingerprint import architecture_of
from services.evaluation.metrics import describe, load_metrics, metric_names
from services.evaluation.model import LoadedModel, load_model
from services.evaluation.model_server import ModelServer
from services.evaluation.multiple_choice import ChoiceItem, answer_multiple_choice, metrics_of
from services.evaluation.question_answering import INSTRUCTION
from services.models.resolve import resolve_model

log = logging.getLogger(__name__)


def evaluate(
    model: str,
    *,
    spec: EvaluationSpec,
    settings: Settings,
    known: Iterable[Generation] = (),
    on_generations: Callable[[Sequence[Generation]], None] = lambda _: None,
    on_progress: Callable[[float], None] = lambda _: None,
    server: ModelServer | None = None,
) -> list[Score]:
    """The scores of a model, benchmark after benchmark in the order of ``spec``.

    Items in ``known`` are not generated again, only judged by the metrics that they lack; ``on_generations`` gets
    whatever is new as its batch finishes, and ``on_progress`` the share that is done, 0 to 1. A metric or a benchmark
    that cannot be carried out has scores without a value, with the reason; EvaluationError when that is so of every
    benchmark. ``server`` writes the greedy answers; likelihoods, samples and attention are computed here all the same.
    """
    directory = resolve_model(model, settings=settings)
    loaded = load_model(directory, server=server)
    by_item = {(generation.benchmark, generation.item_id): generation for generation in known}
    scores: list[Score] = []
    failures: dict[str, Exception] = {}
    for number, benchmark in enumerate(spec.benchmarks):
        steps = _steps(benchmark, spec=spec, loaded=loaded, directory=directory, settings=settings, known=by_item)
        try:
            while (step := _next_step(steps)).scores is None:
                # Outside of the net: what goes wrong at the caller's end is no fault of the benchmark.
                on_generations(step.generations)
                on_progress((number + step.share) / len(spec.benchmarks))
            scores += step.scores
        except _BenchmarkFailed as failed:
            failures[benchmark.name] = failed.cause
            scores += _missing_scores(benchmark, spec=spec, reason=describe(failed.cause))
        on_progress((number + 1) / len(spec.benchmarks))
    if failures and len(failures) == len(spec.benchmarks):
        raise EvaluationError(
            "; ".join(f"{name}: {describe(error)}" for name, error in failures.items()),
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
Known = Mapping[tuple[str, str], Generation]


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
    directory: str,
    settings: Settings,
    known: Known,
) -> Steps:
    if benchmark.name in MULTIPLE_CHOICE:
        answered = answer_multiple_choice(
            benchmark,
            loaded=loaded,
            directory=directory,
            limit=spec.limit,
            batch_size=spec.batch_size,
            settings=settings,
        )
        yield _Step(generations=[_chosen(benchmark.name, item) for item in answered.items], share=1.0)
        yield _Step(scores=answered.scores)
        return
    requests = _requests(benchmark, limit=spec.limit, offline=settings.offline)
    references = [request.reference for request in requests]
    metrics = load_metrics(
        benchmark.name, spec, references=references, loaded=loaded, name=directory, settings=settings
    )
    stored = {item: generation for (name, item), generation in known.items() if name == benchmark.name}
    done: dict[str, Generation] = {}
    for generations in answer_items(
        requests, metrics, benchmark=benchmark.name, spec=spec, loaded=loaded, known=stored
    ):
        done |= {generation.item_id: generation for generation in generations}
        yield _Step(generations=generations, share=len(done) / len(requests))
    # What was known and lacked nothing did not come back.
    answers = [done.get(request.item_id) or stored[request.item_id] for request in requests]
    judges = judged_by(
        benchmark.name, spec, references=lambda: references, architecture=architecture_of(loaded.model.config)
    )
    yield _Step(
        scores=[
            mean_score(metric, answers, metrics, benchmark=benchmark.name, judged_by=judges.get(metric))
            for metric in metrics.names
        ]
    )


def _chosen(benchmark: str, item: ChoiceItem) -> Generation:
    """A question with the choice that the metric takes for the model's, kept to compare models item by item."""
    lengths = [len(choice) or 1 if metrics_of(benchmark)[0] == "acc_norm" else 1 for choice in item.choices]
    shares = [likelihood / length for likelihood, length in zip(item.likelihoods, lengths, strict=True)]
    scores = {metrics_of(benchmark)[0]: item.value}
    if "wrong_nll" in metrics_of(benchmark):
        scores["wrong_nll"] = float(wrong_nll(item.likelihoods, item.right).mean())
    return Generation(
        benchmark=benchmark,
        item_id=item.item_id,
        source=item.question,
        reference=item.choices[item.right],
        output=item.choices[shares.index(max(shares))],
        scores=scores,
        spans=[],
    )


def _requests(benchmark: BenchmarkSpec, *, limit: int | None, offline: bool) -> list[Request]:
    if benchmark.name in QUESTIONS:
        return [
            Request(
                item_id=item.item_id,
                instruction=INSTRUCTION.format(question=item.question),
                source=item.source,
                reference=item.reference,
            )
            for item in load_questions(benchmark, limit=limit, offline=offline)
        ]
    return [
        Request(
            item_id=item.item_id,
            instruction=SUMMARISE[benchmark.name],
            source=item.source,
            reference=item.reference,
        )
        for item in load_items(benchmark, limit=limit, offline=offline)
    ]


def _missing_scores(benchmark: BenchmarkSpec, *, spec: EvaluationSpec, reason: str) -> list[Score]:
    name = benchmark.name
    metrics = metrics_of(name) if name in MULTIPLE_CHOICE else metric_names(name, spec)
    return [Score(benchmark=name, metric=metric, value=None, missing=reason, items=0) for metric in metrics]
