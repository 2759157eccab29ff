"""The metrics of an evaluation, by name: those that can be had, and why the others cannot."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.contract.errors import CancelledError, EvaluationError, InvalidInputError, SmoothKDError
from services.contract.evaluation_spec import QUESTIONS, SUMMARISATION, EvaluationSpec, JudgeSpec
from services.contract.settings import Settings
from services.evaluation.answering import Answer
from services.evaluation.bertscore import load_bertscore
from services.evaluation.consistency.detector import load_detector
from services.evaluation.factual_rate import FactualRate, load_factual_rate
from services.evaluation.hhem import load_hhem
from services.evaluation.model import LoadedModel
from services.evaluation.nli import load_nli
from services.evaluation.overlap import chrf, meteor, meteor_exact_stem
from services.evaluation.question_answering import judge_answer_f1, judge_exact_match
from services.evaluation.rouge import rouge_l
from services.evaluation.self_consistency import SelfConsistency
from services.evaluation.support import check_support
from services.evaluation.verdict import Verdict

log = logging.getLogger(__name__)

Metric = Callable[[Sequence[Answer]], list[Verdict]]
Compare = Callable[..., float | None]
QUESTION_METRICS = ("exact_match", "f1")


@dataclass(kw_only=True)
class Metrics:
    """``judges`` by name, and in ``missing`` the reason for each metric that cannot be had, or that failed.

    ``unjudged``: by metric, the distinct reasons for which outputs have no score, in order.
    """

    names: Sequence[str]
    judges: dict[str, Metric] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unjudged: dict[str, dict[str, None]] = field(default_factory=dict)

    @property
    def measures_attention(self) -> bool:
        """Whether a metric wants lookback ratios, which are cheapest to read while an answer is generated."""
        return any(isinstance(judge, FactualRate) for judge in self.judges.values())

    def judge(self, answers: Sequence[Answer], *, names: Sequence[str]) -> dict[str, list[Verdict]]:
        """Verdicts of those of ``names`` that can be had. A metric that fails is missing from then on."""
        verdicts = {}
        for name in names:
            if name not in self.judges:
                continue
            try:
                verdicts[name] = _finite(self.judges[name](answers), name=name)
            except CancelledError:
                raise
            except Exception as error:
                # Whatever it is, it must not lose the other metrics.
                log.warning("the metric %s failed", name, exc_info=True)
                self.missing[name] = describe(error)
                del self.judges[name]
        return verdicts


def _finite(verdicts: list[Verdict], *, name: str) -> list[Verdict]:
    if not all(one.score is None or math.isfinite(one.score) for one in verdicts):
        raise EvaluationError(f"{name} gives scores that are not finite", fix="Check the weights of what judges.")
    return verdicts


def load_metrics(
    benchmark: str,
    spec: EvaluationSpec,
    *,
    references: Sequence[str],
    loaded: LoadedModel,
    name: str,
    settings: Settings,
) -> Metrics:
    """Those that ``spec`` asks for on the benchmark. ``references``: of all its items. ``name``: the model's, for
    messages."""
    if benchmark in QUESTIONS:
        return Metrics(names=QUESTION_METRICS, judges={"exact_match": judge_exact_match, "f1": judge_answer_f1})
    metrics = Metrics(names=spec.metrics)
    for metric in spec.metrics:
        try:
            metrics.judges[metric] = _load(
                metric, spec, references=references, loaded=loaded, name=name, settings=settings
            )
        except SmoothKDError as error:
            log.warning("%s: no %s: %s. %s", benchmark, metric, error.what, error.fix)
            metrics.missing[metric] = describe(error)
        except Exception as error:
            log.warning("%s: no %s", benchmark, metric, exc_info=True)
            metrics.missing[metric] = describe(error)
    return metrics


def metric_names(benchmark: str, spec: EvaluationSpec) -> Sequence[str]:
    assert benchmark in SUMMARISATION | QUESTIONS
    return QUESTION_METRICS if benchmark in QUESTIONS else spec.metrics


def describe(error: Exception) -> str:
    """One line, without a fix."""
    if isinstance(error, SmoothKDError):
        return error.what
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _load(
    metric: str,
    spec: EvaluationSpec,
    *,
    references: Sequence[str],
    loaded: LoadedModel,
    name: str,
    settings: Settings,
) -> Metric:
    judges = spec.judges
    loaders: dict[str, Callable[[], Metric]] = {
        "rouge_l": lambda: _against_reference(rouge_l),
        "chrf": lambda: _against_reference(chrf),
        "meteor": lambda: _against_reference(_tried(meteor)),
        "meteor_exact_stem": lambda: _against_reference(meteor_exact_stem),
        "bertscore": lambda: _bertscore(judges, references, settings),
        "support": lambda: _support,
        "consistency": _consistency,
        "factual_rate": lambda: load_factual_rate(judges.lens, loaded=loaded, name=name),
        "factual_consistency": lambda: _pairwise(load_hhem(judges.hhem, settings=settings).judge),
        "entailment": lambda: _pairwise(load_nli(judges.nli or "", settings=settings).judge),
        "self_consistency": lambda: SelfConsistency(
            load_detector(), loaded=loaded, samples=spec.samples, max_new_tokens=spec.max_new_tokens
        ),
    }
    return loaders[metric]()


def _tried(compare: Compare) -> Compare:
    """The function, once it is known to work."""
    compare("A word.", reference="A word.")
    return compare


def _against_reference(compare: Compare) -> Metric:
    def judge(answers: Sequence[Answer]) -> list[Verdict]:
        return [Verdict(score=compare(one.output, reference=one.request.reference)) for one in answers]

    return judge


def _pairwise(judge: Callable[[Sequence[tuple[str, str]]], list[Verdict]]) -> Metric:
    return lambda answers: judge([(one.source, one.output) for one in answers])


def _support(answers: Sequence[Answer]) -> list[Verdict]:
    found = [check_support(one.output, source=one.source) for one in answers]
    return [Verdict(score=support.share, spans=support.spans) for support in found]


def _bertscore(judges: JudgeSpec, references: Sequence[str], settings: Settings) -> Metric:
    if judges.idf and len(set(references)) < 2:
        # Whatever is in every reference weighs nothing.
        raise InvalidInputError(
            "bertscore with idf tells words by how few references have them, and there is only one reference",
            fix="Evaluate more items, or leave evaluation.judges.idf off.",
        )
    bertscore = load_bertscore(judges.encoder, settings=settings)
    weights = bertscore.idf(references) if judges.idf else None

    def judge(answers: Sequence[Answer]) -> list[Verdict]:
        scores = bertscore.score([(one.output, one.request.reference) for one in answers], weights=weights)
        return [Verdict(score=score) for score in scores]

    return judge


def _consistency() -> Metric:
    detector = load_detector()

    def judge(answers: Sequence[Answer]) -> list[Verdict]:
        detections = detector.detect([(one.source, one.output) for one in answers])
        return [
            Verdict(score=None if one.score is None else 100 * (1 - one.score), spans=one.spans) for one in detections
        ]

    return judge
