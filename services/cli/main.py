"""The ``smoothkd`` command. Every command imports what it needs when it runs, so that --help answers at once."""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli import labels_commands, lens_commands, result_commands, sweep_commands, teacher_commands
from services.contract.errors import MissingExtraError, SmoothKDError

if TYPE_CHECKING:
    from services.contract.settings import Settings

app = typer.Typer(
    name="smoothkd",
    help="Distil language models with a teacher's soft labels so that they hallucinate less, and show that they do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(sweep_commands.app, name="sweep")
app.add_typer(lens_commands.app, name="lens")
app.add_typer(labels_commands.app, name="labels")

ONE_MACHINE = "One machine"
PARTS = "The platform's parts, one process each"
RESULTS = "Results of sweeps and evaluations"
FILES = "One model, without queue, store or API"

app.command(rich_help_panel=RESULTS)(result_commands.report)
app.command(rich_help_panel=RESULTS)(result_commands.compare)
app.command(rich_help_panel=FILES)(result_commands.overconfidence)

TeacherModel = Annotated[str, typer.Option("--model", help="Directory or hub id of the teacher.")]
Engine = Annotated[str, typer.Option(help="What computes: auto, transformers, vllm, mock.")]
EXTRAS = {
    "fastapi": "api",
    "sse_starlette": "api",
    "uvicorn": "api",
    "alembic": "store",
    "redis": "store",
    "rq": "store",
    "sqlalchemy": "store",
    "psycopg": "postgres",
    "grpc_reflection": "teacher",
    "torch": "worker",
    "transformers": "worker",
    "pyarrow": "worker",
    "rouge_score": "worker",
    "safetensors": "worker",
    "streamlit": "dashboard",
    "krippendorff": "reports",
    "matplotlib": "reports",
}
"""Which extra of the installation brings a package."""

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    """Run the command line; an error of the platform's own prints what happened and what to do."""
    # Teacher and student may share a processor: threads that spin while they wait starve the other's. OpenMP reads
    # this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What fails is said in an error of the platform's own; gRPC's C++ would say it first, for every attempt.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # On a processor it warns of a faster kernel that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except SmoothKDError as error:
        _report(error)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        missing = MissingExtraError(
            f"the package {package} is not installed", fix=f"Run pip install 'smoothkd[{EXTRAS[package]}]'."
        )
        _report(missing)
        sys.exit(missing.exit_code)


@app.command(rich_help_panel=ONE_MACHINE)
def up(
    *,
    model: TeacherModel = DEMO_MODEL,
    engine: Engine = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Queue workers on this machine.")] = 1,
    generation: Annotated[
        bool, typer.Option("--generation", help="With vLLM: also decode, for sequence level, in a second engine.")
    ] = False,
) -> None:
    """Start everything here: queue, teacher, API, workers, dashboard. Ctrl-C ends all."""
    from services.cli.up import run_up

    run_up(_settings(), model=model, engine=engine, workers=workers, generation=generation)


@app.command(rich_help_panel=ONE_MACHINE)
def demo(
    *,
    sweep: Annotated[Path | None, typer.Option(help="Another sweep file than the shipped demo.")] = None,
    leave: Annotated[
        bool, typer.Option("--exit", help="Stop after the table; fail unless every run succeeded.")
    ] = False,
) -> None:
    """Train and compare SFT and KD students on shipped data, then show them in the dashboard."""
    from services.cli.demo import run_demo

    raise typer.Exit(run_demo(_settings(), sweep_file=sweep, leave=leave))


@app.command(rich_help_panel=ONE_MACHINE)
def doctor() -> None:
    """Show what is installed, reachable and free."""
    from services.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(_settings()))


@app.command(rich_help_panel=PARTS)
def api() -> None:
    """Serve the REST API and keep the queue true to the store."""
    from services.api.app import serve
    from services.telemetry import start_telemetry

    settings = _settings()
    start_telemetry("smoothkd-api")
    serve(settings)


app.command(rich_help_panel=PARTS)(teacher_commands.teacher)
app.command(rich_help_panel=PARTS)(teacher_commands.load_teacher)


@app.command(rich_help_panel=PARTS)
def worker() -> None:
    """Take stages from the queue and run each in a process of its own."""
    from services.logs import configure_logging
    from services.telemetry import start_telemetry
    from student_trainer.worker import run_worker

    settings = _settings()
    configure_logging(settings.log_format, levels={"alembic": "WARNING"})
    start_telemetry("smoothkd-worker")
    run_worker(settings)


@app.command(rich_help_panel=PARTS)
def dashboard() -> None:
    """Serve the dashboard."""
    from dashboard.serve import command

    argv = command(_settings())
    os.execvp(argv[0], argv)


@app.command(rich_help_panel=PARTS)
def health(service: Annotated[str, typer.Argument(help="queue, teacher, api, worker or dashboard.")]) -> None:
    """Exit 0 if a part answers as it should; for container health checks."""
    from services.cli.health import require_healthy

    require_healthy(service, _settings())


@app.command(rich_help_panel=FILES)
def fetch(model: Annotated[str, typer.Argument(help="Directory, hub id, or an embedded model's name.")]) -> None:
    """Bring a model to this machine and print where it lies."""
    from services.models.resolve import resolve_model

    typer.echo(resolve_model(model, settings=_settings()))


@app.command(rich_help_panel=FILES)
def train(
    run: Annotated[Path, typer.Argument(help="YAML file of one run (RunSpec).")],
    *,
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and the model.")],
) -> None:
    """Train one student. With alpha above 0 a teacher must be serving; teacher.finetune is carried out first."""
    from services.contract.spec_reading import load_run

    spec = load_run(run)
    from student_trainer.finetune import finetune_teacher
    from student_trainer.launch import REPORT_FILE, in_processes
    from student_trainer.train import train as train_student

    settings = _settings()

    def work() -> None:
        finetune_teacher(spec, settings=settings)
        train_student(spec, out=out, settings=settings)

    command = ["services.cli.main", "train", str(run), "--out", str(out)]
    in_processes(work, command=command, processes=spec.training.processes)
    # Of several processes only the one that waits for them answers.
    if "RANK" not in os.environ or (os.environ["RANK"] == "0" and REPORT_FILE not in os.environ):
        typer.echo(out / "model")


@app.command(rich_help_panel=FILES)
def evaluate(
    *,
    model: Annotated[str, typer.Option(help="Directory or hub id.")],
    benchmarks: Annotated[str, typer.Option(help="Names, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Directory for generations.jsonl and scores.json.")],
    limit: Annotated[int | None, typer.Option(min=1, help="First items of each benchmark only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    metrics: Annotated[
        str | None, typer.Option(help="Of summaries, separated by commas: rouge_l, support, consistency, chrf ...")
    ] = None,
    lens: Annotated[str | None, typer.Option(help="For factual_rate: a lens file instead of a shipped lens.")] = None,
    hhem: Annotated[str | None, typer.Option(help="For factual_consistency: HHEM's directory or hub id.")] = None,
    nli: Annotated[str | None, typer.Option(help="For entailment: an NLI cross-encoder.")] = None,
    encoder: Annotated[str | None, typer.Option(help="For bertscore: the model of word vectors.")] = None,
    idf: Annotated[
        bool, typer.Option("--idf", help="For bertscore: words count for more the fewer references have them.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="For self_consistency: further summaries to draw.")] = 0,
    server: Annotated[
        str | None, typer.Option(help="Who writes the answers: http://HOST:PORT/v1 of `vllm serve MODEL`.")
    ] = None,
) -> None:
    """Measure any language model, trained here or not. NAME=FILE reads a benchmark from a local file."""
    from services.cli.evaluation import evaluate_model

    evaluate_model(
        model,
        benchmarks=benchmarks,
        out=out,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        metrics=metrics,
        judges={"lens": lens, "hhem": hhem, "nli": nli, "encoder": encoder, "idf": idf},
        samples=samples,
        server=server,
        settings=_settings(),
    )


@app.command(rich_help_panel=FILES)
def detect(
    *,
    detector: Annotated[str, typer.Option(help="lexical, lookback, consistency, hhem or nli.")],
    source: Annotated[Path, typer.Option("--input", help="JSONL with document and summary.")],
    target: Annotated[Path, typer.Option("--output", help="The same lines with score and spans.")],
    model: Annotated[
        str | None, typer.Option(help="Of lookback: whose attention is read; of hhem and nli: the judge itself.")
    ] = None,
    lens: Annotated[
        str | None,
        typer.Option(help="For lookback: a lens file or a shipped lens, smollm2-135m-instruct if none is named."),
    ] = None,
) -> None:
    """Mark what summaries say beyond their documents; a higher score is worse."""
    from services.cli.progress import counting
    from services.evaluation.detection import DetectorOptions, detect_file

    options = DetectorOptions(model=model, lens=lens, settings=_settings())
    with counting("Detecting") as progress:
        without = detect_file(detector, source=source, target=target, options=options, progress=progress)
    typer.echo(f"{target}" + (f" ({without} summaries have no score; see their field missing)" if without else ""))


@app.command(hidden=True)
def stage(stage_id: str, *, attempt: Annotated[int, typer.Option(min=1)]) -> None:
    """Run one stage that a worker has begun."""
    from services.cli.stage import run_stage
    from services.telemetry import start_telemetry

    start_telemetry("smoothkd-trainer")
    run_stage(stage_id, attempt_number=attempt, settings=_settings())


def _settings() -> "Settings":
    from services.contract.settings import load_settings

    return load_settings()


def _report(error: SmoothKDError) -> None:
    typer.secho(f"error: {error.what}", fg="red", err=True)
    if error.fix:
        typer.echo(f"  {error.fix}", err=True)


if __name__ == "__main__":
    main()
