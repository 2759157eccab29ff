"""The runs of a sweep as an HTML table: state, stages, and what went wrong in the reader's words."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape

from dashboard.render.words import duration, problem_html, progress_html, run_label, state_badge
from services.contract.records import Problem, RunRecord, StageRecord
from services.reports.colours import method_colours
from services.reports.words import run_setting

STAGE_NAMES = {"finetune_teacher": "teacher", "decode": "decode", "train": "train", "evaluate": "evaluate"}
COLUMNS = ("Run", "State", "Progress", "Stages", "Time", "Worker")


def run_table_html(runs: Sequence[RunRecord], *, now: datetime) -> str:
    """One row per run, and beneath a failed one what happened and what to do."""
    colours = method_colours(run.method for run in runs)
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "".join(_run_rows(run, colour=colours[run.method], now=now) for run in runs)
    return (
        f'<div class="sk-scroll"><table class="sk-table sk-runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def drawn_first(runs: Sequence[RunRecord], *, limit: int) -> list[RunRecord]:
    """At most ``limit`` runs, in the order given: the first of each method, then the second of each, and so on."""
    places: dict[str, int] = {}
    turns: dict[str, int] = {}
    for run in runs:
        places[run.id] = turns.get(run.method, 0)
        turns[run.method] = places[run.id] + 1
    kept = {run.id for run in sorted(runs, key=lambda run: places[run.id])[:limit]}
    return [run for run in runs if run.id in kept]


def legend_html(colours: Mapping[str, str]) -> str:
    """Which colour is which run, for all charts at once; keys are run labels."""
    entries = "".join(
        f'<span class="sk-key"><i class="sk-line" style="background:{colour}"></i>{escape(label)}</span>'
        for label, colour in colours.items()
    )
    return f'<div class="sk-legend">{entries}</div>'


def failures(run: RunRecord) -> list[tuple[str, Problem]]:
    """What went wrong, with the stage it went wrong in; the run's own problem where no stage carries one."""
    found = [(STAGE_NAMES[stage.kind], stage.problem) for stage in run.stages if stage.problem]
    if not found and run.problem:
        found = [("run", run.problem)]
    return found


def _run_rows(run: RunRecord, *, colour: str, now: datetime) -> str:
    cells = (
        f'<span class="sk-method" style="--method:{colour}">{escape(run.method)}</span>'
        f'<span class="sk-setting" title="{escape(run.id)}">{escape(run_setting(run))}</span>',
        state_badge(run.state, cancel_requested=run.cancel_requested),
        progress_html(run.progress, state=run.state),
        "".join(_stage_chip(stage, now=now) for stage in run.stages),
        escape(_run_time(run, now=now)),
        escape(", ".join(dict.fromkeys(stage.worker for stage in run.stages if stage.worker))),
    )
    rows = "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    for stage_name, problem in failures(run):
        title = f"{run_label(run)}: {stage_name} failed"
        rows += f'<tr class="sk-failure"><td colspan="{len(COLUMNS)}">{problem_html(problem, title=title)}</td></tr>'
    return rows


def _stage_chip(stage: StageRecord, *, now: datetime) -> str:
    attempt = f" · attempt {stage.attempt}" if stage.attempt > 1 else ""
    took = duration(stage.started_at, stage.ended_at, now=now)
    tip = ", ".join(
        part for part in (stage.state.value, took, f"worker {stage.worker}" if stage.worker else "") if part
    )
    return (
        f'<span class="sk-stage sk-state-{stage.state.value}" title="{escape(tip)}">'
        f"{STAGE_NAMES[stage.kind]}{attempt}</span>"
    )


def _run_time(run: RunRecord, *, now: datetime) -> str:
    started = [stage.started_at for stage in run.stages if stage.started_at]
    ended = [stage.ended_at for stage in run.stages if stage.ended_at]
    if not started:
        return ""
    all_ended = all(stage.ended_at for stage in run.stages if stage.started_at)
    return duration(min(started), max(ended) if ended and all_ended else None, now=now)
