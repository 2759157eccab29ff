"""A report as LaTeX, in the form of the paper's tables."""

import re
from itertools import groupby

from services.contract.metric_words import metric_title
from services.contract.records import SummaryCell, SummaryRow
from services.contract.report_records import Report
from services.reports.tables import (
    BETTER,
    COMPARISON_COLUMNS,
    WORSE,
    compared,
    comparison_cells,
    difference_note,
    report_columns,
    runs_text,
    verdict,
)
from services.reports.words import mean_std


def latex_report(report: Report) -> str:
    r"""Two ``table`` environments for a document that loads ``booktabs``; bold is the best of its column.

    ``$^\uparrow$`` and ``$^\downarrow$`` mark methods that are better or worse than SFT.
    """
    columns = report_columns(report)
    groups = [(benchmark, len(list(members))) for benchmark, members in groupby(columns, key=lambda column: column[0])]
    heads, rules, place = [], [], 3
    for benchmark, width in groups:
        heads.append(rf"\multicolumn{{{width}}}{{c}}{{{latex_text(benchmark)}}}")
        rules.append(rf"\cmidrule(lr){{{place}-{place + width - 1}}}")
        place += width
    body = [
        " & ".join(
            [
                latex_text(row.method),
                latex_text(runs_text(row)),
                *(_latex_cell(report, row, cell) for cell in row.cells),
            ]
        )
        + r" \\"
        for row in report.summary.rows
    ]
    lines = [
        f"% smoothkd report of sweep {report.sweep_id}; needs \\usepackage{{booktabs}}",
        *_latex_begin(f"{report.name}: {LATEX_NOTE}", "ll" + "r" * len(columns)),
        " & ".join(["Method", "Runs", *heads]) + r" \\",
        *([" ".join(rules)] if rules else []),
        " & ".join(["", "", *(latex_text(metric_title(metric)) for _, metric in columns)]) + r" \\",
        r"\midrule",
        *body,
        *LATEX_END,
    ]
    if report.comparisons:
        lines += [
            *_latex_begin(f"{report.name}: {difference_note(report)}", "lll" + "r" * 6),
            " & ".join(latex_text(name) for name in COMPARISON_COLUMNS) + r" \\",
            r"\midrule",
            *(
                " & ".join(_latex_number(text) for text in comparison_cells(comparison)) + r" \\"
                for comparison in report.comparisons
            ),
            *LATEX_END,
        ]
    return "\n".join(lines) + "\n"


LATEX_NOTE = (
    "mean and sample standard deviation over learning rate, batch size and seed. Bold: best of its column. "
    "Arrows: better or worse than SFT on the same items (Holm-adjusted p < 0.05)."
)
LATEX_END = [r"\bottomrule", r"\end{tabular}", r"\end{table}"]


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in text)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "–": "--",
    BETTER: r"$^\uparrow$",
    WORSE: r"$^\downarrow$",
}


def _latex_begin(caption: str, columns: str) -> list[str]:
    return [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{latex_text(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
    ]


def _latex_cell(report: Report, row: SummaryRow, cell: SummaryCell) -> str:
    text = latex_text(mean_std(cell.mean, cell.std))
    return (rf"\textbf{{{text}}}" if cell.best else text) + latex_text(verdict(compared(report, row, cell)).strip())


def _latex_number(text: str) -> str:
    """Signs of numbers as mathematics: LaTeX sets a hyphen shorter than a minus."""
    return _SIGN.sub(r"$\g<0>$", latex_text(text))


_SIGN = re.compile(r"(?<!\S)[+-](?=\d)")
