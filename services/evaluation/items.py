"""A benchmark's items, answered by the model and judged by every metric: what is known already is not done again."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from services.contract.evaluation_spec import EvaluationSpec
from services.contract.records import Generation, Score
from services.evaluation.answering import Answer, Request, answer, encode_requests
from services.evaluation.metrics import Metrics
from services.evaluation.model import LoadedModel
from services.evaluation.verdict import Verdict

log = logging.getLogger(__name__)

UNJUDGED = "empty, too long, in a script that the metric does not read, or without anything to look up"


def answer_items(
    requests: Sequence[Request],
    metrics: Metrics,
    *,
    benchmark: str,
    spec: EvaluationSpec,
    loaded: LoadedModel,
    known: Mapping[str, Generation],
) -> Iterator[list[Generation]]:
    """New generations, batch by batch: first known outputs that lack a metric, then answers to all other requests.

    ``known`` holds earlier generations by item id; one for another source or reference does not count.
    """
    stored = {
        request.item_id: before
        for request in requests
        if (before := known.get(request.item_id)) is not None
        and (before.source, before.reference) == (request.source, request.reference)
    }
    old = [request for request in requests if request.item_id in stored and _lacking(stored[request.item_id], metrics)]
    new = [request for request in requests if request.item_id not in stored]
    prompts = encode_requests([*old, *new], loaded=loaded, max_new_tokens=spec.max_new_tokens)
    known_answers = [
        Answer(request=request, prompt=prompt, output=stored[request.item_id].output)
        for request, prompt in zip(old, prompts, strict=False)
    ]
    new_answers = answer(
        new,
        prompts[len(old) :],
        loaded=loaded,
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
        measure=metrics.measures_attention,
    )
    size = spec.batch_size
    for batch in chain((known_answers[at : at + size] for at in range(0, len(old), size)), new_answers):
        yield _judge(batch, metrics, benchmark=benchmark, stored=stored)


def mean_score(
    metric: str, generations: Sequence[Generation], metrics: Metrics, *, benchmark: str, judged_by: str | None = None
) -> Score:
    """Over the items that have the metric; how many those are is part of the score.

    A metric that could not be had for every item it should judge has no value but the reason, as has one that judged
    no output: by its own reasons where it gave any.
    """
    if metric in metrics.missing:
        return Score(benchmark=benchmark, metric=metric, value=None, missing=metrics.missing[metric], items=0)
    values = [generation.scores[metric] for generation in generations if metric in generation.scores]
    reasons = "; ".join(metrics.unjudged.get(metric, ()))
    if len(values) < len(generations):
        log.warning(
            "%s: %d of %d outputs have no %s: %s",
            benchmark,
            len(generations) - len(values),
            len(generations),
            metric,
            reasons or f"each is {UNJUDGED}",
        )
    if not values:
        missing = reasons or f"every output is {UNJUDGED}"
        return Score(benchmark=benchmark, metric=metric, value=None, missing=missing, items=0)
    mean = sum(values) / len(values)
    return Score(benchmark=benchmark, metric=metric, value=mean, items=len(values), judged_by=judged_by)


def _lacking(before: Generation, metrics: Metrics) -> list[str]:
    """Metrics that can be had now and that an earlier evaluation did not ask for, or could not have."""
    if not before.output.strip():
        return []
    return [name for name in metrics.judges if name not in before.scores]


def _judge(
    answers: Sequence[Answer], metrics: Metrics, *, benchmark: str, stored: Mapping[str, Generation]
) -> list[Generation]:
    """Verdicts on new answers by all metrics, on ``stored`` ones by those that they lack, beside those they have."""
    before = [stored.get(one.request.item_id) for one in answers]
    wanted = {name for one in before for name in (_lacking(one, metrics) if one else metrics.judges)}
    verdicts = metrics.judge(answers, names=[name for name in metrics.names if name in wanted])
    for name, found in verdicts.items():
        metrics.unjudged.setdefault(name, {}).update({one.missing: None for one in found if one.missing})
    return [
        _generation(
            one, {name: found[index] for name, found in verdicts.items()}, benchmark=benchmark, before=before[index]
        )
        for index, one in enumerate(answers)
    ]


def _generation(
    one: Answer, verdicts: Mapping[str, Verdict], *, benchmark: str, before: Generation | None
) -> Generation:
    scores = {name: verdict.score for name, verdict in verdicts.items() if verdict.score is not None}
    spans = [span for verdict in verdicts.values() for span in verdict.spans]
    if before is not None:
        judged = {span.detector for span in spans}
        scores = {**before.scores, **scores}
        spans = [*(span for span in before.spans if span.detector not in judged), *spans]
    return Generation(
        benchmark=benchmark,
        item_id=one.request.item_id,
        source=one.source,
        reference=one.request.reference,
        output=one.output,
        scores=scores,
        spans=spans,
    )
