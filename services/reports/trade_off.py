"""Faithfulness against general quality: what a method gains in one, it must not lose in the other."""

from collections.abc import Sequence

from services.contract.metric_words import ACCURACY, FAITHFULNESS
from services.contract.records import Summary, SummaryRow
from services.contract.report_records import TradeOff, TradeOffPoint

OVERLAP = "rouge_l"


def find_trade_offs(summary: Summary) -> list[TradeOff]:
    """One for each faithfulness metric that the summary has of any method.

    Quality is accuracy over the multiple-choice benchmarks, or ROUGE-L where the sweep has none. Each is a plain mean
    over benchmarks, so a method that lacks one of them has no place and is named instead.
    """
    columns = list(dict.fromkeys((cell.benchmark, cell.metric) for row in summary.rows for cell in row.cells))
    metrics = [metric for metric in FAITHFULNESS if any(metric == of for _, of in columns)]
    quality, quality_benchmarks = _quality(columns)
    if not quality_benchmarks:
        return []
    found = [
        _trade_off(
            summary,
            metric,
            [benchmark for benchmark, of in columns if of == metric],
            quality=quality,
            quality_benchmarks=quality_benchmarks,
        )
        for metric in metrics
    ]
    return [trade_off for trade_off in found if trade_off.points]


def _quality(columns: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    for metric in (*ACCURACY, OVERLAP):
        benchmarks = [benchmark for benchmark, of in columns if of == metric]
        if benchmarks:
            return metric, benchmarks
    return "", []


def _trade_off(
    summary: Summary, metric: str, benchmarks: list[str], *, quality: str, quality_benchmarks: list[str]
) -> TradeOff:
    placed: list[tuple[str, float, float]] = []
    left_out = []
    for row in summary.rows:
        faithfulness, lacking = _mean(row, metric, benchmarks)
        value, also_lacking = _mean(row, quality, quality_benchmarks)
        if faithfulness is None or value is None:
            left_out.append(f"{row.method} lacks {', '.join([*lacking, *also_lacking])}")
        else:
            placed.append((row.method, value, faithfulness))
    return TradeOff(
        faithfulness=metric,
        quality=quality,
        faithfulness_benchmarks=benchmarks,
        quality_benchmarks=quality_benchmarks,
        points=[
            TradeOffPoint(
                method=method,
                quality=value,
                faithfulness=faithfulness,
                on_front=not any(
                    other >= value and of_other >= faithfulness and (other, of_other) != (value, faithfulness)
                    for _, other, of_other in placed
                ),
            )
            for method, value, faithfulness in placed
        ],
        left_out=left_out,
    )


def _mean(row: SummaryRow, metric: str, benchmarks: Sequence[str]) -> tuple[float | None, list[str]]:
    means = {cell.benchmark: cell.mean for cell in row.cells if cell.metric == metric}
    values = [value for benchmark in benchmarks if (value := means.get(benchmark)) is not None]
    lacking = [f"{metric} of {benchmark}" for benchmark in benchmarks if means.get(benchmark) is None]
    return (None if lacking else sum(values) / len(values)), lacking
