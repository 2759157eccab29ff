"""How the dashboard words things: labels of runs, durations, numbers, and the HTML of small parts."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from html import escape

from services.contract.errors import SmoothKDError
from services.contract.records import Problem, RunRecord
from services.contract.states import State
from services.reports.words import run_setting


def run_label(run: RunRecord) -> str:
    """Method, learning rate, batch size and seed: unique within a sweep."""
    return f"{run.method} · {run_setting(run)}"


def duration(started: datetime | None, ended: datetime | None, *, now: datetime) -> str:
    """``1 h 04 min``, ``3 min 20 s`` or ``12 s``, up to now for what has not ended; empty before it started."""
    if started is None:
        return ""
    seconds = int(max((ended or now) - started, timedelta()).total_seconds())
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    if seconds >= 60:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds} s"


def state_badge(state: State, *, cancel_requested: bool = False) -> str:
    """HTML: the state in its colour; ``cancelling`` while work that was running winds down."""
    word = "cancelling" if cancel_requested and state in (State.QUEUED, State.RUNNING) else state.value
    return f'<span class="sk-badge sk-state-{state.value}">{word}</span>'


def state_counts(runs: Mapping[State, int]) -> str:
    """``2 succeeded, 1 running, 3 queued``: what has happened first."""
    order = (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED, State.RUNNING, State.QUEUED)
    return ", ".join(f"{runs[state]} {state.value}" for state in order if runs.get(state))


def progress_html(fraction: float, *, state: State) -> str:
    """A bar in the state's colour with its percentage."""
    percent = round(100 * min(max(fraction, 0.0), 1.0))
    return (
        f'<span class="sk-progress sk-state-{state.value}" role="progressbar" aria-valuenow="{percent}" '
        f'aria-valuemin="0" aria-valuemax="100"><i style="width:{percent}%"></i></span>'
        f'<span class="sk-percent">{percent} %</span>'
    )


def problem_html(problem: Problem | SmoothKDError, *, title: str = "") -> str:
    """What happened and what to do, escaped; a list where the API named several mistakes of a specification."""
    heading = f"<strong>{escape(title)}</strong>" if title else ""
    details = problem.details if isinstance(problem, SmoothKDError) else {}
    mistakes = [line for name, line in details.items() if name.startswith("error.")]
    if len(mistakes) > 1:
        what = "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in mistakes) + "</ul>"
    else:
        what = f"<p>{escape(problem.what)}</p>"
    fix = f'<p class="sk-fix">{_with_commands(problem.fix)}</p>' if problem.fix else ""
    return f'<div class="sk-problem" role="alert">{heading}{what}{fix}</div>'


def _with_commands(text: str) -> str:
    """Escaped; what stands between backticks is shown as a command."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return "".join(f"<code>{escape(part)}</code>" if index % 2 else escape(part) for index, part in enumerate(parts))
