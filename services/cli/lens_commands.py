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
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint that labels what has no spans, up to /v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model that judges there.")] = None,
) -> None:
    """Train a lens from human labels, or a judge's; prints its cross-validated AUROC.

    The judge's key is read from SMOOTHKD_JUDGE_KEY.
    """
    from services.cli.progress import counting
    from services.contract.errors import InvalidInputError

    if (judge_url is None) != (judge_model is None):
        raise InvalidInputError("a judge needs both its URL and its model", fix="Give --judge-url and --judge-model.")
    from services.contract.settings import load_settings
    from services.evaluation.lookback.judge import Judge
    from services.evaluation.lookback.train import train_lens

    kinds: dict[str, Literal["windows", "predefined"]] = {"windows": "windows", "predefined": "predefined"}
    if spans not in kinds:
        raise InvalidInputError(f"spans {spans!r} is unknown", fix="Choose windows or predefined.")
    settings = load_settings()
    judge = None
    if judge_url is not None and judge_model is not None:
        key = settings.judge_key.get_secret_value() if settings.judge_key else None
        judge = Judge(url=judge_url, model=judge_model, api_key=key)
    with counting("Training") as progress:
        lens = train_lens(
            data,
            model=model,
            out=out,
            settings=settings,
            spans=kinds[spans],
            folds=folds,
            seed=seed,
            judge=judge,
            cache=cache,
            progress=progress,
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
    from services.cli.progress import counting
    from services.contract.settings import load_settings
    from services.evaluation.lookback.train import evaluate_lens

    with counting("Measuring") as progress:
        report = evaluate_lens(data, lens=lens, model=model, settings=load_settings(), cache=cache, progress=progress)
    typer.echo(report.model_dump_json(indent=2))
