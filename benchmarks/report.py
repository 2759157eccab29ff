"""How every benchmark reports: a table for people, and the same rows as JSON under .smoothkd/bench for programs."""

import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parents[1] / ".smoothkd" / "bench"


def report(name: str, *, title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> None:
    """Print ``rows``, whose keys are the columns, and write them to NAME.json with the machine they were taken on."""
    table = Table(title=title, title_justify="left", caption=" ".join(notes), caption_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], int | float) else "left")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    console = Console(width=140)
    console.print(table)
    console.print(f"on {machine()}\n")
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "title": title,
        "machine": machine(),
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": rows,
        "notes": notes,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def machine() -> str:
    """The processor or GPU, in words."""
    parts = [_processor(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
