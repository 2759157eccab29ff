"""``smoothkd lens``: train and check Lookback Lens classifiers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Train and check Lookback Lens classifiers.", no_args_is_help=True)

Labelled = Annotated[
    Path, typer.Argument(help="JSONL of document, summary, spans; or a folder in the form of XSumFaith's.")
]
Model = Annotated[str, typer.Option(help="The model whose attention the lens reads.")]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps measurements, to go on after an interruption.")]


@app.command()
def train(
    data: Labelled,
    *,
    model: Model,
    out: Annotated[Path, typer.Option(help="JSON file of the lens.")],
    spans: Annotated[str, typer.Option(help="windows of 8 tokens, or the predefined spans.")] = "windows",
    folds: Annotated[int, typer.Option(min=2)] = 5,
    seed: int = 0,
    cache: Cache = None,
) -> None:
    """Train a lens from human labels; prints its cross-validated AUROC."""
    from services.contract.errors import InvalidInputError
    from services.contract.settings import load_settings
    from services.evaluation.lookback.train import train_lens

    kinds: dict[str, Literal["windows", "predefined"]] = {"windows": "windows", "predefined": "predefined"}
    if spans not in kinds:
        raise InvalidInputError(f"spans {spans!r} is unknown", fix="Choose windows or predefined.")
    lens = train_lens(
        data, model=model, out=out, settings=load_settings(), spans=kinds[spans], folds=folds, seed=seed, cache=cache
    )
    typer.echo(lens.model_dump_json(indent=2, include={"training"}))


@app.command("eval")
def evaluate(
    data: Labelled,
    *,
    model: Model,
    lens: Annotated[str, typer.Option(help="JSON file, or the name of a shipped lens.")],
    cache: Cache = None,
) -> None:
    """Print what a lens is worth on labelled summaries."""
    from services.contract.settings import load_settings
    from services.evaluation.lookback.train import evaluate_lens

    report = evaluate_lens(data, lens=lens, model=model, settings=load_settings(), cache=cache)
    typer.echo(report.model_dump_json(indent=2))
