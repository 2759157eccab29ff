"""``smoothkd sweep``: submit sweeps to the API, and follow them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Submit sweeps to the API and follow them.", no_args_is_help=True)

SweepId = Annotated[str, typer.Argument(help="Identifier that submit and list print.")]


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="YAML file of a sweep (SweepSpec).")],
    *,
    idempotency_key: Annotated[str | None, typer.Option(help="Sending the same key twice makes one sweep.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
) -> None:
    """Check a sweep, expand it to runs and queue them; prints its identifier."""
    from services.cli import sweep_views
    from services.contract.spec_reading import load_sweep

    spec = load_sweep(file)
    with sweep_views.client() as api:
        sweep = api.submit_sweep(sweep_views.with_absolute_paths(spec, file), idempotency_key=idempotency_key)
        typer.echo(sweep.id)
        if watch:
            raise typer.Exit(sweep_views.watch(api, sweep.id))


@app.command("list")
def list_sweeps() -> None:
    """List sweeps, newest first."""
    from services.cli import sweep_views

    with sweep_views.client() as api:
        sweep_views.show_sweeps(api)


@app.command()
def show(sweep_id: SweepId) -> None:
    """Show a sweep's runs and its summary table."""
    from services.cli import sweep_views

    with sweep_views.client() as api:
        sweep_views.show_sweep(api, sweep_id)


@app.command()
def cases(
    sweep_id: SweepId,
    *,
    out: Annotated[Path | None, typer.Option(help="File .json, .md or .html; the terminal if none.")] = None,
    metric: Annotated[str, typer.Option(help="A per-item metric, or unsupported_words.")] = "unsupported_words",
    benchmark: Annotated[str | None, typer.Option(help="Only this benchmark.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="As many items.")] = 20,
) -> None:
    """Show or save the items where SFT and KD differ most, either way: source, outputs, unsupported spans."""
    from services.cli import case_views

    case_views.show_cases(sweep_id, out=out, metric=metric, benchmark=benchmark, limit=limit)


@app.command()
def cancel(sweep_id: SweepId) -> None:
    """Cancel what has not ended; running students save a checkpoint."""
    from services.cli import sweep_views

    with sweep_views.client() as api:
        typer.echo(f"{api.cancel_sweep(sweep_id).id}: cancel requested")


@app.command()
def watch(sweep_id: SweepId) -> None:
    """Follow a sweep to its end; exits 0 only if every run succeeded."""
    from services.cli import sweep_views

    with sweep_views.client() as api:
        raise typer.Exit(sweep_views.watch(api, sweep_id))
