"""A report as Markdown and CSV: the paper's table, then every difference from SFT with its interval."""

import csv
import io
from collections.abc import Sequence

from services.contract.metric_words import metric_title
from services.contract.records import SummaryCell, SummaryRow
from services.contract.report_records import Comparison, Report
from services.reports.words import interval, mean_std, p_text

Column = tuple[str, str]
"""Benchmark and metric."""

BETTER, WORSE = "▲", "▼"
MARKS = f"{BETTER} better than SFT, {WORSE} worse, surely enough (Holm-adjusted p < 0.05); no mark: open"


def markdown_report(report: Report) -> str:
    """Tables in GitHub's Markdown, with the counts and reasons that a reader needs to weigh them."""
    lines = [f"# {_plain(report.name)}", "", facts_line(report), "", f"## {RESULTS}", ""]
    columns = report_columns(report)
    header = [
        "Method",
        "Runs",
        *(f"{benchmark} {metric_title(metric)}{_arrow(report, metric)}" for benchmark, metric in columns),
    ]
    lines += [_row(header), _row(["---", "---", *["---:"] * len(columns)])]
    for row in report.summary.rows:
        cells = [_marked(cell_text(cell), compared(report, row, cell)) for cell in row.cells]
        lines.append(_row([row.method, runs_text(row), *cells]))
    lines += ["", table_note(report), *_list(missing_lines(report))]
    if report.comparisons:
        lines += ["", f"## {DIFFERENCES}", "", difference_note(report), "", _row(COMPARISON_COLUMNS)]
        lines.append(_row(["---"] * 3 + ["---:"] * 6))
        lines += [_row(comparison_cells(comparison)) for comparison in report.comparisons]
    for trade_off in report.trade_offs:
        lines += ["", f"## {trade_off_title(trade_off.faithfulness, trade_off.quality)}", ""]
        lines += [
            _row(["Method", metric_title(trade_off.quality), metric_title(trade_off.faithfulness), "On the front"])
        ]
        lines += [_row(["---", "---:", "---:", "---"])]
        lines += [
            _row([point.method, f"{point.quality:.2f}", f"{point.faithfulness:.2f}", "yes" if point.on_front else "no"])
            for point in trade_off.points
        ]
        lines += _list(trade_off.left_out)
    if report.failures:
        lines += ["", f"## {FAILURES}", *_list(failure_lines(report))]
    return "\n".join(lines) + "\n"


def csv_report(report: Report) -> str:
    """One line per method, benchmark and metric, with every number in full precision (RFC 4180)."""
    found = {(one.method, one.benchmark, one.metric): one for one in report.comparisons}
    out = io.StringIO()
    writer = csv.writer(out)
    measured = ("difference", "low", "high", "p_value", "p_adjusted", "items", "left_out", "pairs")
    cell_fields = ("benchmark", "metric", "mean", "std", "runs", "best", "missing")
    writer.writerow(["method", "alpha", "planned_runs", *cell_fields, *measured, "no_difference_because"])
    for row in report.summary.rows:
        for cell in row.cells:
            one = found.get((row.method, cell.benchmark, cell.metric))
            writer.writerow(
                [
                    *(row.method, row.alpha, row.runs),
                    *(_csv_value(getattr(cell, field)) for field in cell_fields),
                    *(_csv_value(getattr(one, field) if one else None) for field in (*measured, "missing")),
                ]
            )
    return out.getvalue()


RESULTS = "Results"
DIFFERENCES = "Differences from SFT on the same items"
FAILURES = "Runs that did not succeed"
COMPARISON_COLUMNS = [
    "Method",
    "Benchmark",
    "Metric",
    "Difference",
    "95 % interval",
    "p",
    "p adjusted",
    "Items",
    "Pairs of runs",
]


def report_columns(report: Report) -> list[Column]:
    """Benchmark and metric of every column of the table."""
    return [(cell.benchmark, cell.metric) for row in report.summary.rows[:1] for cell in row.cells]


def compared(report: Report, row: SummaryRow, cell: SummaryCell) -> Comparison | None:
    """The comparison with SFT behind a cell of the table."""
    wanted = (row.method, cell.benchmark, cell.metric)
    return next((one for one in report.comparisons if (one.method, one.benchmark, one.metric) == wanted), None)


def facts_line(report: Report) -> str:
    """Which sweep this is."""
    teacher = f", teacher {report.teacher}" if report.teacher else ""
    return (
        f"Sweep {report.sweep_id} ({report.state.value}), of {report.created_at:%Y-%m-%d}: student {report.student}"
        f"{teacher}, data set {report.dataset}."
    )


def table_note(report: Report) -> str:
    """How to read the table."""
    return (
        "Mean ± sample standard deviation over learning rate × batch size × seed, of the runs that have the metric "
        f"(n, where they are fewer than the row's). Bold: best of its column. {MARKS}. Failed runs count nowhere."
    )


def difference_note(report: Report) -> str:
    """What the differences, intervals and p-values are."""
    return (
        "Mean over items of method minus SFT, runs paired by learning rate, batch size and seed. Intervals by "
        f"paired bootstrap over items ({report.resamples:,} resamples), p-values by sign-flip test; p adjusted for all "
        "of them (Holm)."
    )


def trade_off_title(faithfulness: str, quality: str) -> str:
    return f"{metric_title(faithfulness)} against {metric_title(quality)}"


def runs_text(row: SummaryRow) -> str:
    """``6``, or ``4 of 6 ended``."""
    return str(row.runs) if row.ended == row.runs else f"{row.ended} of {row.runs} ended"


def cell_text(cell: SummaryCell) -> str:
    """Mean and deviation; the best in bold."""
    text = mean_std(cell.mean, cell.std)
    return f"**{text}**" if cell.best else text


def comparison_cells(comparison: Comparison) -> list[str]:
    """In the order of COMPARISON_COLUMNS; what is missing leads to its reason in the difference's place."""
    start = [comparison.method, comparison.benchmark, metric_title(comparison.metric)]
    if comparison.difference is None:
        return [*start, f"– ({comparison.missing})", "–", "–", "–", "–", str(comparison.pairs)]
    items = f"{comparison.items}" + (f" (+{comparison.left_out} on one side only)" if comparison.left_out else "")
    return [
        *start,
        f"{comparison.difference:+.2f}{verdict(comparison)}",
        interval(comparison.low, comparison.high),
        p_text(comparison.p_value),
        p_text(comparison.p_adjusted),
        items,
        str(comparison.pairs),
    ]


def missing_lines(report: Report) -> list[str]:
    """What the table lacks and why, one line per method and reason."""
    gaps: dict[tuple[str, str], list[str]] = {}
    for row in report.summary.rows:
        for cell in row.cells:
            if cell.mean is None:
                reason = cell.missing or "no reason given"
                gaps.setdefault((row.method, reason), []).append(f"{cell.benchmark} {metric_title(cell.metric)}")
            elif cell.runs < row.runs:
                gaps.setdefault((row.method, f"n = {cell.runs} of {row.runs} runs"), []).append(
                    f"{cell.benchmark} {metric_title(cell.metric)}"
                )
    return [f"{method}, {', '.join(columns)}: {reason}" for (method, reason), columns in gaps.items()]


def failure_lines(report: Report) -> list[str]:
    """Every run that failed, was cancelled or skipped, and why."""
    return [
        f"{one.method} · {one.setting} ({one.run_id}): {one.state.value}"
        + (f", {one.problem.what}" if one.problem else "")
        for one in report.failures
    ]


def verdict(comparison: Comparison | None) -> str:
    """A mark with a space before it where the difference is sure enough, else nothing."""
    if comparison is None or comparison.better is None:
        return ""
    return f" {BETTER}" if comparison.better else f" {WORSE}"


def _marked(text: str, comparison: Comparison | None) -> str:
    return f"{text}{verdict(comparison)}"


def _arrow(report: Report, metric: str) -> str:
    return "" if report.directions.get(metric, True) else " (lower is better)"


def _csv_value(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else value


def _plain(text: str) -> str:
    return text.replace("\n", " ")


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _list(lines: Sequence[str]) -> list[str]:
    return ["", *(f"- {_plain(line)}" for line in lines)] if lines else []
