"""How far something long has come, on stderr: a bar in a terminal, a plain line every few seconds elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """``what`` is counted in ``unit`` up to ``total``; use it as a context."""

    def __init__(self, what: str, *, unit: str, total: int) -> None:
        self._what = what
        self._unit = unit
        self._total = total
        self._started = time.monotonic()
        self._last_line = float("-inf")
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=total, note="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, *, note: str = "") -> None:
        """``note``: a few words behind the count."""
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if done < self._total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        line = f"{self._what}: {done}/{self._total} {self._unit}"
        print(f"{line}, {note}" if note else line, file=sys.stderr, flush=True)  # noqa: T201
