"""``smoothkd evaluate``."""

from collections.abc import Mapping
from pathlib import Path

from services.cli.absolute_paths import absolute_evaluation
from services.contract.errors import InvalidInputError
from services.contract.evaluation_spec import EvaluationSpec
from services.contract.settings import Settings
from services.contract.spec_reading import parse_evaluation


def evaluate_model(
    model: str,
    *,
    benchmarks: str,
    out: Path,
    limit: int | None,
    max_new_tokens: int,
    batch_size: int,
    metrics: str | None,
    judges: Mapping[str, str | bool | None],
    samples: int,
    server: str | None,
    settings: Settings,
) -> None:
    """Check what was asked for before anything is loaded, then measure and print the scores."""
    named = {} if metrics is None else {"metrics": [text.strip() for text in metrics.split(",") if text.strip()]}
    spec = parse_evaluation(
        {
            **named,
            "judges": {role: name for role, name in judges.items() if name is not None},
            "samples": samples,
            "benchmarks": [_benchmark(text) for text in benchmarks.split(",") if text.strip()],
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        }
    )
    _check_judges(judges, spec)
    _run(model, absolute_evaluation(spec), out, settings, server=server)


JUDGED = {"lens": "factual_rate", "hhem": "factual_consistency", "nli": "entailment", "encoder": "bertscore"}
"""Which metric each judge serves."""


def _check_judges(judges: Mapping[str, str | bool | None], spec: EvaluationSpec) -> None:
    for role, metric in JUDGED.items():
        if judges.get(role) is not None and metric not in spec.metrics:
            raise InvalidInputError(
                f"--{role} only serves the metric {metric}, which is not asked for",
                fix=f"Leave it out, or name {metric} among --metrics.",
            )


def measure_confidence(
    models: list[str],
    *,
    data: str | None,
    out: Path,
    examples: list[int],
    limit: int | None,
    batch_size: int,
    settings: Settings,
) -> None:
    """``smoothkd overconfidence``: measure every model, then print a table."""
    from rich.console import Console
    from rich.table import Table

    from services.evaluation.overconfidence import COLUMNS, measure_overconfidence, table_row

    found = measure_overconfidence(
        models, data=data, out=out, examples=examples, limit=limit, batch_size=batch_size, settings=settings
    )
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for one in found:
        table.add_row(*table_row(one))
    Console().print(table)
    Console().print(f"{out / 'overconfidence.html'}", soft_wrap=True, highlight=False)


def _benchmark(text: str) -> dict[str, str]:
    name, _, path = text.strip().partition("=")
    return {"name": name, "path": path} if path else {"name": name}


def _run(model: str, spec: EvaluationSpec, out: Path, settings: Settings, *, server: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from services.evaluation.directory import evaluate_to_directory

    scores = evaluate_to_directory(model, spec, out, settings, server=server)
    table = Table(box=None, pad_edge=False)
    for column in ("benchmark", "metric", "value", "items"):
        # Names and addresses in reasons are whole.
        table.add_column(column, overflow="fold")
    for score in scores:
        value = f"{score.value:.2f}" if score.value is not None else f"– ({score.missing})"
        table.add_row(score.benchmark, score.metric, value, str(score.items))
    Console().print(table)
