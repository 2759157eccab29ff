"""How well each hallucination detector agrees with people: ``python -m services.evaluation.validation``.

AUROC against human labels on XSumFaith (words and summaries), DeFacto and BUMP, and the rank correlation with expert
ratings on SummEval, each with a 95 % bootstrap interval over documents; written as a Markdown table. A trained
detector is judged on documents that it was not trained on.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from services.contract.settings import Settings
from services.evaluation.consistency.held_out import Judgement
from services.evaluation.consistency.labelled import Example, read_labelled
from services.evaluation.hhem import load_hhem
from services.evaluation.judges import judge_by, judge_held_out, judge_lookback, judge_novel_words, judge_support
from services.evaluation.nli import load_nli

RESAMPLES = 1000
SEED = 0
MEASURED = frozenset({"xsumfaith", "defacto", "bump", "bump-reference", "summeval"})
"""Whose outputs the measures read: people's corrections are there to learn from, and the lens reads slowly."""

Detector = Callable[[Sequence[Example]], list[Judgement]]


class Lookback(StrEnum):
    NONE = "none"
    XSUMFAITH = "xsumfaith"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A value with its bootstrap interval, or None with a ``missing`` reason; ``skipped`` outputs had no score."""

    value: float | None
    low: float = float("nan")
    high: float = float("nan")
    skipped: int = 0
    missing: str = ""


def main(
    data: Annotated[Path, typer.Option(help="Folder of the labelled sets.")],
    held_out: Annotated[Path, typer.Option(help="Folder that the consistency training wrote.")],
    lookback: Annotated[
        Lookback, typer.Option(help="What the lookback lens judges; its model reads every document, seconds for each.")
    ] = Lookback.ALL,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps what the lens measured.")] = None,
    hhem: Annotated[str | None, typer.Option(help="HHEM's directory or hub id, to judge as well.")] = None,
    nli: Annotated[str | None, typer.Option(help="An NLI cross-encoder, to judge as well.")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/detectors.md"),
) -> None:
    """Validate the hallucination detectors against human labels."""
    detectors: dict[str, Detector] = {
        "novel words (baseline)": judge_novel_words,
        "support": judge_support,
        "consistency": lambda examples: judge_held_out(examples, folder=held_out),
    }
    if lookback != Lookback.NONE:
        detectors["lookback"] = lambda examples: judge_lookback(
            [one for one in examples if one.origin in MEASURED and lookback in (Lookback.ALL, one.origin)],
            settings=Settings(),
            cache=cache,
        )
    if hhem is not None:
        judge = load_hhem(hhem, settings=Settings()).judge
        detectors["hhem"] = lambda examples: judge_by(examples, judge)
    if nli is not None:
        cross_encoder = load_nli(nli, settings=Settings()).judge
        detectors[f"nli {nli}"] = lambda examples: judge_by(examples, cross_encoder)
    command = "python -m services.evaluation.validation " + shlex.join(sys.argv[1:])
    table = render_table(validate(read_labelled(data), detectors), command=command)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table, encoding="utf-8")
    Console(highlight=False, soft_wrap=True).print(table, markup=False)


def validate(examples: Sequence[Example], detectors: dict[str, Detector]) -> dict[str, dict[str, Measured]]:
    """Detector by detector, measure by measure (the keys of MEASURES), what each reaches."""
    results = {}
    for name, judge in detectors.items():
        judgements = {judgement.key: judgement for judgement in judge(examples)}
        results[name] = {
            title: _measure(*rows(examples, judgements), statistic=statistic)
            for title, (rows, statistic) in MEASURES.items()
        }
    return results


def render_table(results: dict[str, dict[str, Measured]], *, command: str) -> str:
    """Markdown: one row per detector, one column per measure."""
    lines = [
        "# How well the hallucination detectors agree with people",
        "",
        _EXPLANATION,
        "",
        "| detector | " + " | ".join(MEASURES) + " |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for name, measured in results.items():
        lines.append(f"| {name} | " + " | ".join(_cell(measured[title]) for title in MEASURES) + " |")
    return "\n".join([*lines, "", "Made by", "", f"    {command}", ""])


def _cell(measured: Measured) -> str:
    if measured.value is None:
        return measured.missing
    skipped = f", {measured.skipped} unscored" if measured.skipped else ""
    return f"{measured.value:.3f} ({measured.low:.3f} to {measured.high:.3f}{skipped})"


Rows = tuple[list[tuple[int, float, float]], int]
"""(group, label, score) of what was scored, and how many outputs a detector gave no score."""


def _word_rows(examples: Sequence[Example], judgements: dict[str, Judgement]) -> Rows:
    """A labelled word has the highest score among the ranges that overlap it, 0 where none does."""
    rows, skipped = [], 0
    for example in examples:
        if example.units is None or example.spans is None:
            continue
        judgement = judgements.get(example.key)
        if judgement is None or judgement.score is None:
            skipped += 1
            continue
        wrong = set(example.spans)
        for start, end in example.units:
            score = max((value for first, last, value in judgement.ranges if first < end and start < last), default=0.0)
            rows.append((example.group, float((start, end) in wrong), score))
    return rows, skipped


def _output_rows(*origins: str) -> Callable[[Sequence[Example], dict[str, Judgement]], Rows]:
    def rows(examples: Sequence[Example], judgements: dict[str, Judgement]) -> Rows:
        found, skipped = [], 0
        for example in examples:
            if example.origin not in origins:
                continue
            judgement = judgements.get(example.key)
            if judgement is None or judgement.score is None:
                skipped += 1
                continue
            label = float(bool(example.unsupported)) if example.rating is None else -example.rating
            found.append((example.group, label, judgement.score))
        return found, skipped

    return rows


def _pair_rows(examples: Sequence[Example], judgements: dict[str, Judgement]) -> Rows:
    """Each edited summary against the reference it was made from: 1 where it scores higher, 0.5 at a tie."""
    references = {example.document: example.key for example in examples if example.origin == "bump-reference"}
    rows, skipped = [], 0
    for example in examples:
        if example.origin != "bump":
            continue
        edited, reference = judgements.get(example.key), judgements.get(references[example.document])
        if edited is None or reference is None or edited.score is None or reference.score is None:
            skipped += 1
            continue
        won = 0.5 * (float(edited.score > reference.score) + float(edited.score >= reference.score))
        rows.append((example.group, 1.0, won))
    return rows, skipped


Array = npt.NDArray[np.float64]


def _auroc(labels: Array, scores: Array) -> float:
    return float(roc_auc_score(labels, scores)) if len(set(labels)) == 2 else float("nan")


def _rank_correlation(labels: Array, scores: Array) -> float:
    return float(spearmanr(labels, scores).statistic) if len(set(scores)) > 1 and len(set(labels)) > 1 else float("nan")


def _mean_score(labels: Array, scores: Array) -> float:
    return float(scores.mean())


MEASURES = {
    "XSumFaith words": (_word_rows, _auroc),
    "XSumFaith summaries": (_output_rows("xsumfaith"), _auroc),
    "DeFacto": (_output_rows("defacto"), _auroc),
    "BUMP": (_output_rows("bump", "bump-reference"), _auroc),
    "BUMP pairs won": (_pair_rows, _mean_score),
    "SummEval rank correlation": (_output_rows("summeval"), _rank_correlation),
}


def _measure(
    rows: list[tuple[int, float, float]], skipped: int, *, statistic: Callable[[Array, Array], float]
) -> Measured:
    """The statistic over all rows, and its 2.5th and 97.5th percentile over resampled documents."""
    if not rows:
        return Measured(value=None, skipped=skipped, missing="no output was scored")
    groups, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    value = statistic(labels, scores)
    if np.isnan(value):
        return Measured(value=None, skipped=skipped, missing="labels or scores are all alike")
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    generator = np.random.default_rng(SEED)
    values = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[place] for place in generator.integers(len(members), size=len(members))])
        values.append(statistic(labels[drawn], scores[drawn]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Measured(value=value, low=float(low), high=float(high), skipped=skipped)


_EXPLANATION = """\
AUROC against human labels, with 95 % bootstrap intervals over documents; 0.5 is chance, 1 is full agreement.
"BUMP pairs won" is the share of edited summaries that score worse than the reference they were made from, and the last
column is Spearman's correlation of the score with the experts' inconsistency. The trained detectors, consistency and
lookback, judge each document by what they learnt without it and without any document that shares its text; neither
learns from SummEval, and lookback from XSumFaith's labels alone. The consistency scores are those that
`python -m services.evaluation.consistency.train` leaves beside its weights. HHEM and NLI cross-encoders come from the
model hub; `--hhem NAME` and `--nli NAME` add a row for each."""


if __name__ == "__main__":
    typer.run(main)
