"""One sweep of the list: what it compares, where it stands."""

from html import escape

from dashboard.render.words import state_badge, state_counts
from services.contract.records import SweepPlan, SweepRecord
from services.contract.spec import GridSpec
from services.contract.states import ENDED, State

BAR_ORDER = (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED, State.RUNNING, State.QUEUED)


def sweep_card_html(sweep: SweepRecord, *, progress: float | None = None) -> str:
    """Name, state, models, grid and a bar of its runs by state.

    ``progress``: share of all the work that is done, 0 to 1, where it is known more exactly than by counting runs.
    """
    spec = sweep.spec
    teacher = f"{spec.teacher.model} → " if spec.teacher else ""
    total = sum(sweep.runs.values())
    created = sweep.created_at.astimezone().strftime("%Y-%m-%d %H:%M")
    benchmarks = ", ".join(benchmark.name for benchmark in spec.evaluation.benchmarks) or "no evaluation"
    facts = {
        "Models": f"{teacher}{spec.student.model}",
        "Data": f"{spec.dataset.path}, {spec.distillation.level} level",
        "Grid": _grid(spec.grid),
        "Benchmarks": benchmarks,
    }
    listed = "".join(f"<span>{name}</span><span>{escape(fact)}</span>" for name, fact in facts.items())
    return (
        '<div class="sk-sweep">'
        f'<div class="sk-sweep-head"><strong>{escape(sweep.name)}</strong>'
        f"{state_badge(sweep.state, cancel_requested=sweep.cancel_requested)}"
        f'<span class="sk-dim">{created} · <code>{escape(sweep.id)}</code></span></div>'
        f'<div class="sk-facts">{listed}</div>'
        f"{_bar(sweep)}"
        f'<div class="sk-dim">{total} run{"s" if total != 1 else ""}: {state_counts(sweep.runs)}'
        f"{_percent(sweep, progress=progress)}</div></div>"
    )


def plan_html(plan: SweepPlan) -> str:
    """The runs that a checked specification would make."""
    rows = "".join(
        f"<tr><td>{escape(run.method)}</td><td>{run.learning_rate!r}</td><td>{run.batch_size}</td><td>{run.seed}</td></tr>"
        for run in plan.runs
    )
    return (
        f"<p><strong>{escape(plan.name)}</strong> holds together and would make {len(plan.runs)} "
        f"run{'s' if len(plan.runs) != 1 else ''}. Nothing was stored.</p>"
        '<div class="sk-scroll"><table class="sk-table sk-plan"><thead><tr><th>Method</th><th>Learning rate</th>'
        f"<th>Batch size</th><th>Seed</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _grid(grid: GridSpec) -> str:
    axes = (("alpha", grid.alpha), ("lr", grid.learning_rate), ("bs", grid.batch_size), ("seed", grid.seed))
    return " × ".join(f"{name} {', '.join(f'{value:g}' for value in values)}" for name, values in axes)


def _bar(sweep: SweepRecord) -> str:
    parts = "".join(
        f'<i class="sk-state-{state.value}" style="flex:{sweep.runs[state]}" title="{sweep.runs[state]} {state.value}">'
        "</i>"
        for state in BAR_ORDER
        if sweep.runs.get(state)
    )
    return f'<div class="sk-bar">{parts}</div>'


def _percent(sweep: SweepRecord, *, progress: float | None) -> str:
    total = sum(sweep.runs.values())
    if sweep.state in ENDED or not total:
        return ""
    done = sum(count for state, count in sweep.runs.items() if state in ENDED) / total
    return f" · {round(100 * (done if progress is None else progress))} % done"
