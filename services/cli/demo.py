"""The whole platform in about ten minutes: SFT against KD on shipped data, from an empty directory to the dashboard."""

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID

from services.cli import sweep_views
from services.cli.supervisor import Supervisor
from services.cli.up import dashboard_url, running_platform, serve_until_stopped
from services.contract.api_client import ApiClient
from services.contract.errors import ApiUnavailableError
from services.contract.settings import Settings
from services.contract.shipped import shipped_sweep
from services.contract.spec_reading import load_sweep
from services.contract.states import State

console = Console()

PATIENCE_SECONDS = 300.0
"""How long the API may stay away before the demo gives up."""


def run_demo(settings: Settings, *, sweep_file: Path | None, leave: bool) -> int:
    """Run a sweep on a platform started for it; 0 only if every run succeeded.

    With ``leave`` everything stops after the table, else the platform serves until Ctrl-C.
    """
    started = time.monotonic()
    file = sweep_file or shipped_sweep("demo.yaml")
    spec = sweep_views.with_absolute_paths(load_sweep(file), file)
    model = spec.teacher.model if spec.teacher else spec.student.model
    status = 1
    with running_platform(settings, model=model, engine="auto", workers=1) as supervisor:
        with sweep_views.client_of(settings) as api:
            sweep = api.submit_sweep(spec)
            console.print(f"\nsweep {sweep.id}: watch it at {_page(settings, sweep.id)}\n", soft_wrap=True)
            _follow(api, sweep.id, supervisor)
            runs = api.all_runs(sweep.id)
            status = 0 if all(run.state == State.SUCCEEDED for run in runs) else 1
            console.print(sweep_views.summary_table(api.summary(sweep.id), width=console.width))
            for run in runs:
                if run.problem:
                    console.print(f"[red]{run.method}[/]: {escape(run.problem.what)}\n  {escape(run.problem.fix)}")
        minutes = (time.monotonic() - started) / 60
        console.print(f"\n{minutes:.1f} minutes. Case studies: {_page(settings, sweep.id)}", soft_wrap=True)
        if not leave:
            console.print("Serving until Ctrl-C.")
            serve_until_stopped(supervisor)
    return status


def _follow(api: ApiClient, sweep_id: str, supervisor: Supervisor) -> None:
    with sweep_views.progress_bars() as bars:
        tasks: dict[str, TaskID] = {}
        heard = time.monotonic()
        while True:
            try:
                if sweep_views.show_progress(bars, tasks, api.all_runs(sweep_id)):
                    return
                heard = time.monotonic()
            except ApiUnavailableError:
                # A busy machine answers late, and an API that ended is started again below.
                if time.monotonic() - heard > PATIENCE_SECONDS:
                    raise
            for name in supervisor.restart_ended():
                console.print(f"{name} ended and was started again")
            time.sleep(1)


def _page(settings: Settings, sweep_id: str) -> str:
    return f"{dashboard_url(settings)}/case_studies?sweep={sweep_id}"
