"""``smoothkd report``, ``compare`` and ``overconfidence``: what sweeps and models have shown."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    sweep_id: Annotated[str, typer.Argument(help="Identifier that sweep list prints.")],
    *,
    out: Annotated[Path, typer.Option(help="Directory for report.md, report.csv, report.tex, report.html.")],
    formats: Annotated[str, typer.Option("--format", help="Of md, csv, tex, html, json.")] = "md,csv,tex,html",
) -> None:
    """Write a sweep's tables, differences from SFT with their uncertainty, plots and case studies."""
    from services.cli.report_commands import write_report

    for file in write_report(sweep_id, out=out, formats=formats):
        typer.echo(file)


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Directory of an evaluation, or a run's id.")],
    second: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say whether B is better than A, metric by metric on the same items, and how sure that is."""
    from services.cli.comparison import compare_sides, print_versus
    from services.contract.settings import load_settings

    versus = compare_sides(first, second, settings=load_settings())
    if as_json:
        typer.echo(versus.model_dump_json(indent=2))
    else:
        print_versus(versus)


def overconfidence(
    *,
    model: Annotated[list[str], typer.Option(help="Directory or hub id; repeat it to compare several.")],
    out: Annotated[Path, typer.Option(help="Directory for overconfidence.json, plots and a page.")],
    data: Annotated[str | None, typer.Option(help="CommonsenseQA as a file; the hub's validation set if none.")] = None,
    examples: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Answered questions shown first, for base models; repeat it to tell each model's."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First questions only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Measure how sure models are of wrong answers: likelihoods, calibration, entropy."""
    from services.cli.evaluation import measure_confidence
    from services.contract.settings import load_settings

    measure_confidence(
        model,
        data=data,
        out=out,
        examples=examples or [0],
        limit=limit,
        batch_size=batch_size,
        settings=load_settings(),
    )
