"""``smoothkd labels``: labels made before they are needed, shared as files, and the cache they lie in."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.contract.settings import Settings
    from services.labels.cache import LabelCache
    from student_trainer.precompute import Precomputed

app = typer.Typer(help="Make soft labels ahead, share them as files, look into their cache.", no_args_is_help=True)

SweepOrRun = Annotated[Path, typer.Argument(help="YAML file of a sweep or of one run.")]
Directory = Annotated[Path, typer.Argument(help="Directory that `smoothkd labels export` has written.")]


@app.command()
def precompute(spec: SweepOrRun) -> None:
    """Ask the serving teacher for every record's labels, so that its cache has them."""
    _report(_precompute(spec, out=None))


@app.command()
def export(
    spec: SweepOrRun, *, out: Annotated[Path, typer.Option(help="Directory; what it holds already stays.")]
) -> None:
    """Write every record's labels to files that train without a teacher (distillation.labels.path)."""
    done = _precompute(spec, out=out)
    _report(done)
    typer.echo(f"{done.already} sequences were there already: {out}")


@app.command("import")
def import_(directory: Directory) -> None:
    """Put labels from files into this machine's cache, for the teacher that made them."""
    from services.labels.files import LabelFiles, import_labels

    files = LabelFiles(directory)
    with _cache() as cache:
        import_labels(files, cache)
        counts = cache.stats().since_start
    teacher = files.manifest.teacher
    typer.echo(
        f"{counts.stored} of {len(files)} sequences put into {cache.directory}; a teacher {teacher.model} with the "
        f"fingerprint {teacher.fingerprint[:8]} serves them"
    )
    if counts.failed or counts.evicted:
        typer.echo(
            f"{counts.failed} found no room, and {counts.evicted} others had to go: raise SMOOTHKD_LABEL_CACHE_GIB",
            err=True,
        )


@app.command()
def info() -> None:
    """Show what lies in this machine's cache, and how often it was of use."""
    with _cache(must_exist=True) as cache:
        stats = cache.stats()
    asked = stats.ever.hits + stats.ever.misses
    share = f" ({stats.ever.hits / asked:.1%} of {asked} asked for)" if asked else ""
    for name, value in {
        "directory": cache.directory,
        "sequences": stats.entries,
        "size": f"{stats.bytes / 1024**2:,.1f} of at most {stats.max_bytes / 1024**2:,.0f} MiB",
        "hits": f"{stats.ever.hits}{share}",
        "evicted": stats.ever.evicted,
        "damaged": stats.ever.damaged,
        "not kept": stats.ever.failed,
    }.items():
        typer.echo(f"{name:10} {value}")


@app.command()
def clear() -> None:
    """Delete all labels from this machine's cache; they are computed again when asked for."""
    with _cache(must_exist=True) as cache:
        entries = cache.stats().entries
        cache.clear()
    typer.echo(f"deleted the labels of {entries} sequences from {cache.directory}")


def _precompute(file: Path, *, out: Path | None) -> "Precomputed":
    from services.contract.spec_reading import load_runs

    runs = load_runs(file)
    from student_trainer.precompute import precompute_labels
    from student_trainer.watcher import stop_on_signals

    with stop_on_signals() as stopping:
        return precompute_labels(runs, settings=_settings(), out=out, should_stop=stopping)


def _report(done: "Precomputed") -> None:
    typer.echo(
        f"{done.sequences} sequences, {done.tokens} tokens, {done.hits} from the teacher's cache, {done.seconds:.1f} s"
    )


def _cache(*, must_exist: bool = False) -> "LabelCache":
    from services.contract.errors import InvalidInputError, NotFoundError
    from services.labels.cache import LabelCache

    settings = _settings()
    if not settings.label_cache_gib:
        raise InvalidInputError("the label cache is turned off", fix="Set SMOOTHKD_LABEL_CACHE_GIB above 0.")
    directory = settings.resolved_label_cache_dir
    if must_exist and not directory.exists():
        raise NotFoundError(
            f"there is no label cache in {directory}", fix="A teacher makes it; SMOOTHKD_LABEL_CACHE_DIR says where."
        )
    return LabelCache(directory, max_bytes=round(settings.label_cache_gib * 2**30))


def _settings() -> "Settings":
    from services.contract.settings import load_settings

    return load_settings()
