"""Self-contained pages: one HTML file each, with style and plots inside, without scripts, fetching nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from services.contract.metric_words import MEANINGS, metric_title
from services.contract.records import CaseStudy, MetricPoint, RunRecord, SummaryCell, SummaryRow
from services.contract.report_records import Report, TradeOff
from services.reports.case_cards import STYLE, study_html
from services.reports.colours import method_colours
from services.reports.plots import comparison_plot, curve_plot, figure_html, trade_off_plot
from services.reports.tables import (
    COMPARISON_COLUMNS,
    DIFFERENCES,
    FAILURES,
    RESULTS,
    compared,
    comparison_cells,
    difference_note,
    facts_line,
    failure_lines,
    missing_lines,
    report_columns,
    runs_text,
    table_note,
    trade_off_title,
    verdict,
)
from services.reports.words import mean_std, run_setting

CURVES = ("loss", "hard_loss", "soft_loss", "learning_rate", "grad_norm")
CURVE_TITLES = {
    "loss": "Loss (hard + alpha × soft, per response token)",
    "hard_loss": "Hard loss (against the data set's words)",
    "soft_loss": "Soft loss (against the teacher)",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
}
LONG = 40
"""Characters beyond which a cell breaks its lines."""
# The browser itself then refuses whatever a mistake of ours might let through.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the page shows beside the report. ``points`` are training metrics by run id."""

    runs: Sequence[RunRecord]
    points: Mapping[str, Sequence[MetricPoint]]
    studies: Sequence[CaseStudy]


def html_report(report: Report, evidence: Evidence) -> str:
    """The whole report as a page to send on or keep: tables, plots, the widest case studies."""
    colours = method_colours(row.method for row in report.summary.rows)
    parts = [
        f"<h2>{RESULTS}</h2>",
        _results_html(report, colours),
        f'<p class="sk-note">{escape(table_note(report))}</p>',
        list_html(missing_lines(report)),
        _comparisons_html(report, colours),
        *(_trade_off_html(trade_off, colours) for trade_off in report.trade_offs),
        _curves_html(evidence, colours),
        studies_html(evidence.studies, evidence.runs, colours),
    ]
    if report.failures:
        parts += [f"<h2>{FAILURES}</h2>", list_html(failure_lines(report))]
    return page_html(report.name, facts_line(report), "".join(parts))


def page_html(title: str, facts: str, body: str) -> str:
    """A whole document; ``body`` is HTML, the others are text."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8") + STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f'<body><h1>{escape(title)}</h1><p class="sk-dim">{escape(facts)}</p>{body}</body></html>\n'
    )


def studies_html(studies: Sequence[CaseStudy], runs: Sequence[RunRecord], colours: Mapping[str, str]) -> str:
    """Case studies below each other; empty where there are none."""
    settings = {run.id: run_setting(run) for run in runs}
    cards = "".join(
        study_html(study, number=number, settings=settings, colours=colours)
        for number, study in enumerate(studies, start=1)
    )
    return f"<h2>Case studies: where SFT and KD differ most</h2>{cards}" if cards else ""


def list_html(lines: Sequence[str]) -> str:
    """Text lines as a list; empty where there are none."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of text cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_text_cell, row))}</tr>" for row in rows)
    return f'<div class="sk-scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text_cell(text: str) -> str:
    kind = ' class="sk-long"' if len(text) > LONG else ""
    return f"<td{kind}>{escape(text)}</td>"


def method_html(method: str, colours: Mapping[str, str]) -> str:
    """A method's name with its colour."""
    return f'<span class="sk-method" style="--method:{colours[method]}">{escape(method)}</span>'


def _results_html(report: Report, colours: Mapping[str, str]) -> str:
    columns = report_columns(report)
    groups = "".join(
        f'<th colspan="{len(list(members))}">{escape(benchmark)}</th>'
        for benchmark, members in groupby(columns, key=lambda column: column[0])
    )
    metrics = "".join(
        f'<th title="{escape(MEANINGS.get(metric, metric))}">{escape(metric_title(metric))}</th>'
        for _, metric in columns
    )
    body = "".join(
        f"<tr><td>{method_html(row.method, colours)}</td><td>{escape(runs_text(row))}</td>"
        + "".join(_cell_html(report, row, cell) for cell in row.cells)
        + "</tr>"
        for row in report.summary.rows
    )
    return (
        f'<div class="sk-scroll"><table><thead><tr><th rowspan="2">Method</th><th rowspan="2">Runs</th>{groups}</tr>'
        f"<tr>{metrics}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell_html(report: Report, row: SummaryRow, cell: SummaryCell) -> str:
    text = escape(mean_std(cell.mean, cell.std))
    count = f' <span class="sk-dim">n={cell.runs}</span>' if cell.mean is not None and cell.runs != row.runs else ""
    mark = verdict(compared(report, row, cell))
    title = f' title="{escape(cell.missing)}"' if cell.missing else ""
    return f"<td{title}>{f'<strong>{text}</strong>' if cell.best else text}{mark}{count}</td>"


def _comparisons_html(report: Report, colours: Mapping[str, str]) -> str:
    if not report.comparisons:
        return ""
    rows = [comparison_cells(comparison) for comparison in report.comparisons]
    drawn = any(comparison.difference is not None for comparison in report.comparisons)
    plot = (
        figure_html(
            comparison_plot(report.comparisons, colours=colours), caption=f"{DIFFERENCES}; filled: p adjusted < 0.05"
        )
        if drawn
        else ""
    )
    note = f'<p class="sk-note">{escape(difference_note(report))}</p>'
    return f"<h2>{DIFFERENCES}</h2>{note}{plot}{table_html(COMPARISON_COLUMNS, rows)}"


def _trade_off_html(trade_off: TradeOff, colours: Mapping[str, str]) -> str:
    title = trade_off_title(trade_off.faithfulness, trade_off.quality)
    caption = f"{title}: a point per method, the dashed line is the Pareto front; up and right is better."
    plot = figure_html(trade_off_plot(trade_off, colours=colours), caption=caption)
    return f"<h2>{escape(title)}</h2>{plot}{list_html(trade_off.left_out)}"


def _curves_html(evidence: Evidence, colours: Mapping[str, str]) -> str:
    by_label = {f"{run.method} · {run_setting(run)}": run for run in evidence.runs if evidence.points.get(run.id)}
    line_colours = {label: colours[run.method] for label, run in by_label.items()}
    figures = []
    for metric in CURVES:
        curves = {}
        for label, run in by_label.items():
            own = sorted((point.step, point.value) for point in evidence.points[run.id] if point.name == metric)
            if own:
                curves[label] = ([step for step, _ in own], [value for _, value in own])
        if curves:
            svg = curve_plot(CURVE_TITLES[metric], curves, colours=line_colours)
            figures.append(figure_html(svg, caption=f"{CURVE_TITLES[metric]}; {len(curves)} runs"))
    if not figures:
        return ""
    methods = dict.fromkeys(run.method for run in by_label.values())
    legend = " ".join(method_html(method, colours) for method in methods)
    return f'<h2>Training curves</h2><p>{legend}</p><div class="sk-figures">{"".join(figures)}</div>'
