"""What the terminal shows of sweeps: lists, progress and the summary table."""

import itertools
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from services.cli.absolute_paths import absolute_evaluation, absolute_name
from services.contract.api_client import ApiClient
from services.contract.metric_words import metric_title
from services.contract.records import RunRecord, Summary, SummaryCell
from services.contract.settings import Settings, load_settings
from services.contract.spec import SweepSpec
from services.contract.states import ENDED, State
from services.datasets.reading import SHIPPED

console = Console()
TITLE = "SFT against KD"

STATE_STYLE = {
    State.QUEUED: "dim",
    State.RUNNING: "cyan",
    State.SUCCEEDED: "green",
    State.FAILED: "red",
    State.CANCELLED: "yellow",
    State.SKIPPED: "yellow",
}


def client() -> ApiClient:
    """A client of the API that the environment names."""
    return client_of(load_settings())


def client_of(settings: Settings) -> ApiClient:
    return ApiClient(settings.resolved_api_url, settings.api_key)


def with_absolute_paths(spec: SweepSpec, file: Path) -> SweepSpec:
    """The sweep with paths that exist beside its file, or from here, made absolute; the API may run elsewhere."""
    places = (file.parent, Path())
    data = spec.model_dump()
    data["dataset"]["path"] = absolute_name(spec.dataset.path, places=places, shipped=SHIPPED)
    data["evaluation"] = absolute_evaluation(spec.evaluation, places=places).model_dump()
    for role in ("student", "teacher"):
        if data[role]:
            data[role]["model"] = absolute_name(data[role]["model"], places=places)
    return SweepSpec.model_validate(data)


def show_sweeps(api: ApiClient) -> None:
    """One line per sweep, newest first."""
    table = Table("sweep", "name", "state", "runs", "created", box=None, pad_edge=False)
    page = api.sweeps()
    for sweep in page.items:
        runs = ", ".join(f"{count} {state}" for state, count in sweep.runs.items() if count)
        table.add_row(sweep.id, sweep.name, _styled(sweep.state), runs, f"{sweep.created_at:%Y-%m-%d %H:%M}")
    if page.next_cursor:
        table.add_row("…", "older sweeps follow: GET /v1/sweeps")
    console.print(table if page.items else "No sweeps yet. Submit one: smoothkd sweep submit sweeps/demo.yaml")


def show_sweep(api: ApiClient, sweep_id: str) -> None:
    """A sweep's runs, and its summary so far."""
    runs = api.all_runs(sweep_id)
    # Other commands want the identifier: a narrow terminal must not cut it.
    longest = max((len(run.id) for run in runs), default=0)
    table = Table(
        *(Column("run", min_width=longest), "method", "lr", "batch", "seed", "state", ""), box=None, pad_edge=False
    )
    for run in runs:
        trouble = escape(f"{run.problem.what} {run.problem.fix}") if run.problem else f"{run.progress:.0%}"
        spec = run.spec
        table.add_row(
            *(run.id, run.method, f"{spec.learning_rate:g}", str(spec.batch_size), str(spec.seed)),
            *(_styled(run.state), trouble),
        )
    console.print(table)
    console.print(summary_table(api.summary(sweep_id), width=console.width))


def watch(api: ApiClient, sweep_id: str) -> int:
    """Progress bars until the sweep has ended, then its summary; 0 only if every run succeeded."""
    with progress_bars() as bars:
        tasks: dict[str, TaskID] = {}
        while not show_progress(bars, tasks, api.all_runs(sweep_id)):
            time.sleep(2)
    runs = api.all_runs(sweep_id)
    console.print(summary_table(api.summary(sweep_id), width=console.width))
    for run in runs:
        if run.problem:
            console.print(f"[red]{run.method}[/] ({run.id}): {escape(run.problem.what)}\n  {escape(run.problem.fix)}")
    return 0 if all(run.state == State.SUCCEEDED for run in runs) else 1


def progress_bars() -> Progress:
    """Bars for ``show_progress``; in a terminal they move, in a log file the last state is printed."""
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[doing]:<24}"),
        TimeElapsedColumn(),
        console=console,
    )


def show_progress(bars: Progress, tasks: dict[str, TaskID], runs: list[RunRecord]) -> bool:
    """Bring the bars up to date; whether every run has ended."""
    labels = run_labels(runs)
    for run in runs:
        running = [stage.kind.value for stage in run.stages if stage.state == State.RUNNING]
        doing = ", ".join(running) if running else run.state.value
        if run.id not in tasks:
            tasks[run.id] = bars.add_task(labels[run.id], total=1.0, doing=doing, start=run.state != State.QUEUED)
        task = next(task for task in bars.tasks if task.id == tasks[run.id])
        if run.state != State.QUEUED and not task.started:
            bars.start_task(task.id)
        if run.state in ENDED:
            bars.stop_task(task.id)
        bars.update(task.id, completed=run.progress, doing=doing)
        if not console.is_terminal and doing != task.fields.get("printed"):
            console.print(f"{labels[run.id]}: {doing}")
            bars.update(task.id, printed=doing)
    return bool(runs) and all(run.state in ENDED for run in runs)


def run_labels(runs: list[RunRecord]) -> dict[str, str]:
    """Each run's method, and whatever of learning rate, batch size and seed tells it from the others."""
    specs = [run.spec for run in runs]
    labels = {}
    for run in runs:
        parts = [run.method]
        for name, axis in (("lr", "learning_rate"), ("batch", "batch_size"), ("seed", "seed")):
            if len({getattr(spec, axis) for spec in specs}) > 1:
                parts.append(f"{name}={getattr(run.spec, axis):g}")
        labels[run.id] = " ".join(parts)
    return labels


def summary_table(summary: Summary, *, width: int) -> Table:
    """Mean±std over learning rate x batch size x seed per method; the best by each metric is bold.

    A row per method, or per metric where ``width`` columns of a terminal have no room for that.
    """
    metrics = list(dict.fromkeys((cell.benchmark, cell.metric) for row in summary.rows for cell in row.cells))
    table = _methods_down(summary, metrics)
    if Measurement.get(console, console.options.update(width=10_000), table).maximum <= width:
        return table
    return _metrics_down(summary, metrics)


def _methods_down(summary: Summary, metrics: list[tuple[str, str]]) -> Table:
    table = Table("method", "runs", title=TITLE, title_justify="left")
    for benchmark, metric in metrics:
        table.add_column(f"{benchmark}\n{metric_title(metric)}", justify="right")
    for row in summary.rows:
        cells = {(cell.benchmark, cell.metric): cell for cell in row.cells}
        table.add_row(row.method, f"{row.ended}/{row.runs}", *(_cell_text(cells.get(metric)) for metric in metrics))
    return table


def _metrics_down(summary: Summary, metrics: list[tuple[str, str]]) -> Table:
    """A section per benchmark; why a metric is missing stands below, once."""
    table = Table("", title=TITLE, title_justify="left", padding=(0, 0, 0, 1), caption_justify="left")
    for row in summary.rows:
        table.add_column(
            f"{row.method.replace(' ', chr(10))}\n{row.ended}/{row.runs}", justify="right", overflow="fold"
        )
    reasons: dict[str, None] = {}
    for benchmark, of_benchmark in itertools.groupby(metrics, key=lambda metric: metric[0]):
        table.add_section()
        table.add_row(f"[dim]{benchmark}[/]")
        for metric in of_benchmark:
            cells = [
                next((cell for cell in row.cells if (cell.benchmark, cell.metric) == metric), None)
                for row in summary.rows
            ]
            reasons |= {
                f"{metric_title(metric[1])}: {escape(cell.missing)}": None for cell in cells if cell and cell.missing
            }
            table.add_row(metric_title(metric[1]), *(_cell_text(cell, with_reason=False) for cell in cells))
    table.caption = "\n".join(reasons) or None
    return table


def _cell_text(cell: SummaryCell | None, *, with_reason: bool = True) -> str:
    if cell is None:
        return "–"
    if cell.mean is None:
        return f"– ({escape(cell.missing)})" if cell.missing and with_reason else "–"
    text = f"{cell.mean:.2f}" if cell.std is None else f"{cell.mean:.2f}±{cell.std:.2f}"
    return f"[bold green]{text}[/]" if cell.best else text


def _styled(state: State) -> str:
    return f"[{STATE_STYLE[state]}]{state.value}[/]"
