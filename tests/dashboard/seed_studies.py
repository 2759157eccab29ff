"""Case studies over the shipped articles: summaries with invented facts, fewer the more a student is distilled."""

import json
import random
import re
from pathlib import Path

import services.datasets
from services.contract.records import CaseOutput, CaseStudy, RunRecord, Span

ARTICLES = Path(services.datasets.__path__[0]) / "data" / "demo_news.jsonl"
INVENTED_NAMES = ("Marlow Venn", "Port Esker", "Doctor Ilse Varga", "Northbank Holdings")
INVENTED_ENDS = (
    "A final decision is expected before the end of September.",
    "Residents have welcomed the announcement, saying it was long overdue.",
    "Shares in the company fell by 7 percent on the news.",
)
LEVELS = {"SFT": 3, "KD alpha=0.1": 2, "KD alpha=1": 1}
"""How many facts each method invents, at most."""


def make_studies(runs: list[RunRecord]) -> list[CaseStudy]:
    """Twelve items, widest difference first; the last is of xsum and as long as a newspaper's."""
    records = [json.loads(line) for line in ARTICLES.read_text(encoding="utf-8").splitlines()][:12]
    firsts = {run.method: run for run in reversed(runs)}
    studies = []
    for index, record in enumerate(records):
        source = record["article"] if index < 11 else "\n\n".join(other["article"] for other in records[:5])
        outputs = []
        for method in dict.fromkeys(run.method for run in runs):
            noise = random.Random(f"{index}{method}")
            output = invent(
                record["highlights"], facts=noise.randint(LEVELS.get(method, 2) - 1, LEVELS.get(method, 2)), noise=noise
            )
            spans = find_unsupported(output, source)
            support = 100 * (1 - len(spans) / max(len(re.findall(r"\w{4,}", output)), 1))
            scores = {"rouge_l": 40 + noise.gauss(0, 9), "support": support}
            outputs.append(
                CaseOutput(run_id=firsts[method].id, method=method, output=output, scores=scores, spans=spans)
            )
        shares = [len(output.spans) / max(len(output.output.split()), 1) for output in outputs]
        studies.append(
            CaseStudy(
                benchmark="demo_news" if index < 11 else "xsum",
                item_id=record["id"] if index < 11 else "38264402",
                source=source,
                reference=record["highlights"],
                outputs=outputs,
                difference=max((shares[0] - share for share in shares[1:]), key=abs),
            )
        )
    return sorted(studies, key=lambda study: -abs(study.difference))


def by_metric(studies: list[CaseStudy], metric: str) -> list[CaseStudy]:
    """Those that have the metric on both sides, the widest difference first."""
    found = []
    for study in studies:
        values = [output.scores.get(metric) for output in study.outputs]
        gains = [value - values[0] for value in values[1:] if value is not None and values[0] is not None]
        if gains:
            found.append(study.model_copy(update={"metric": metric, "difference": max(gains, key=abs) / 100}))
    return sorted(found, key=lambda study: -abs(study.difference))


def invent(summary: str, *, facts: int, noise: random.Random) -> str:
    """The summary with that many facts made up: a number changed, a name put in, an ending added."""
    if facts >= 1:
        summary = re.sub(r"\d+", lambda found: str(int(found.group()) + noise.randint(3, 90)), summary, count=1)
    if facts >= 2:
        summary = re.sub(
            r"(?<=[a-z] )([A-Z][a-z]+ ?)+",
            lambda found: noise.choice(INVENTED_NAMES) + (" " if found.group().endswith(" ") else ""),
            summary,
            count=1,
        )
    return f"{summary} {noise.choice(INVENTED_ENDS)}" if facts >= 3 else summary


def find_unsupported(output: str, source: str) -> list[Span]:
    """Words, names and numbers of the output that the source does not contain."""
    known = set(re.findall(r"\w+", source.lower()))
    spans = []
    for found in re.finditer(r"\w+", output):
        word = found.group()
        if word.lower() in known or (len(word) < 4 and not word.isdigit()):
            continue
        kind = "number" if word.isdigit() else "entity" if word[0].isupper() else "word"
        spans.append(
            Span(
                start=found.start(),
                end=found.end(),
                detector="support",
                kind=kind,
                score={"number": 1.0, "entity": 0.9, "word": 0.5}[kind],
                explanation=f"the source does not contain “{word}”",
            )
        )
    return spans
