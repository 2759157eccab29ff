"""A sweep's result table in the paper's form: a row per method, a column per benchmark and metric."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from services.contract.metric_words import MEANINGS, metric_title
from services.contract.records import Summary, SummaryCell, SummaryRow
from services.reports.colours import method_colours
from services.reports.words import mean_std

Column = tuple[str, str]
"""Benchmark and metric."""


def summary_columns(summary: Summary) -> list[Column]:
    """Benchmarks in the order in which the rows first name them, their metrics likewise."""
    benchmarks: dict[str, dict[str, None]] = {}
    for row in summary.rows:
        for cell in row.cells:
            benchmarks.setdefault(cell.benchmark, {})[cell.metric] = None
    return [(benchmark, metric) for benchmark, metrics in benchmarks.items() for metric in metrics]


def find_cell(row: SummaryRow, column: Column) -> SummaryCell | None:
    return next((cell for cell in row.cells if (cell.benchmark, cell.metric) == column), None)


def summary_table_html(summary: Summary) -> str:
    """Mean ± standard deviation, the best of each column in bold with a star, gaps explained on hover."""
    columns = summary_columns(summary)
    colours = method_colours(row.method for row in summary.rows)
    groups = "".join(
        f'<th colspan="{len(list(members))}" class="sk-group">{escape(benchmark)}</th>'
        for benchmark, members in groupby(columns, key=lambda column: column[0])
    )
    metrics = "".join(
        f'<th title="{escape(MEANINGS.get(metric, metric))}">{escape(metric_title(metric))}</th>'
        for _, metric in columns
    )
    body = "".join(_row_html(row, columns, colour=colours[row.method]) for row in summary.rows)
    return (
        '<div class="sk-scroll"><table class="sk-table sk-summary"><thead>'
        f'<tr><th rowspan="2">Method</th><th rowspan="2" title="ended / planned">Runs</th>{groups}</tr>'
        f"<tr>{metrics}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def missing_lines(summary: Summary) -> list[str]:
    """What the table lacks and why, one line per method and reason."""
    gaps: dict[tuple[str, str], list[str]] = {}
    for row in summary.rows:
        for column in summary_columns(summary):
            cell = find_cell(row, column)
            if cell is None or cell.mean is None:
                gaps.setdefault((row.method, _reason(row, cell)), []).append(f"{column[0]} {metric_title(column[1])}")
    return [f"{method} lacks {', '.join(columns)}: {reason}" for (method, reason), columns in gaps.items()]


def missing_html(summary: Summary) -> str:
    """The same as a list; empty where nothing is missing."""
    items = "".join(f"<li>{escape(line)}</li>" for line in missing_lines(summary))
    return f'<ul class="sk-notes">{items}</ul>' if items else ""


def headline_html(summary: Summary) -> str:
    """One tile per column: the best method, and how far it is from SFT; none before both have a mean."""
    colours = method_colours(row.method for row in summary.rows)
    tiles = "".join(_tile(summary, column, colours) for column in summary_columns(summary))
    return f'<div class="sk-tiles">{tiles}</div>' if tiles else ""


def _row_html(row: SummaryRow, columns: Sequence[Column], *, colour: str) -> str:
    method = f'<th scope="row"><span class="sk-method" style="--method:{colour}">{escape(row.method)}</span></th>'
    cells = "".join(_cell_html(row, find_cell(row, column)) for column in columns)
    return f"<tr>{method}<td>{_runs(row)}</td>{cells}</tr>"


def _cell_html(row: SummaryRow, cell: SummaryCell | None) -> str:
    if cell is None or cell.mean is None:
        return f'<td class="sk-missing" title="{escape(_reason(row, cell))}">–</td>'
    text = mean_std(cell.mean, cell.std)
    runs = f"{cell.runs} run{'s' if cell.runs != 1 else ''}"
    count = "" if cell.runs == row.runs else f'<span class="sk-count">n={cell.runs}</span>'
    if cell.best:
        return f'<td class="sk-best" title="best of its column, {runs}">★ <strong>{text}</strong>{count}</td>'
    return f'<td title="{runs}">{text}{count}</td>'


def _reason(row: SummaryRow, cell: SummaryCell | None) -> str:
    if cell is not None and cell.missing:
        return cell.missing
    return "no run of this method has been evaluated yet" if row.ended < row.runs else "not measured"


def _runs(row: SummaryRow) -> str:
    return str(row.runs) if row.ended == row.runs else f"{row.ended} of {row.runs} ended"


def _tile(summary: Summary, column: Column, colours: dict[str, str]) -> str:
    baseline = next((find_cell(row, column) for row in summary.rows if row.method == "SFT"), None)
    compared_with_sft = any(
        row.method != "SFT" and (cell := find_cell(row, column)) and cell.mean is not None for row in summary.rows
    )
    best = next(((row, cell) for row in summary.rows if (cell := find_cell(row, column)) and cell.best), None)
    if best is None or baseline is None or baseline.mean is None or not compared_with_sft:
        return ""
    row, cell = best
    assert cell.mean is not None
    if row.method == "SFT":
        compared = "no KD method does better"
    else:
        compared = f"{cell.mean - baseline.mean:+.2f} against SFT ({mean_std(baseline.mean, baseline.std)})"
    benchmark, metric = column
    meaning = escape(MEANINGS.get(metric, ""))
    return (
        f'<div class="sk-tile" style="--method:{colours[row.method]}" title="{meaning}">'
        f'<span class="sk-dim">{escape(benchmark)} · {escape(metric_title(metric))}</span>'
        f"<strong>{mean_std(cell.mean, cell.std)}</strong>"
        f'<span><span class="sk-method" style="--method:{colours[row.method]}">{escape(row.method)}</span> '
        f"{compared}</span></div>"
    )
