"""Colours of methods and runs: of middle lightness, so that they read on light and dark pages alike."""

from collections.abc import Sequence

from dashboard.render.words import run_label
from services.contract.records import RunRecord
from services.reports.colours import method_colours


def run_colours(runs: Sequence[RunRecord]) -> dict[str, str]:
    """A colour per run label: the method's hue, lighter from run to run of the same method."""
    by_method = method_colours(run.method for run in runs)
    colours = {}
    for method, base in by_method.items():
        labels = [run_label(run) for run in runs if run.method == method]
        for index, label in enumerate(labels):
            colours[label] = _lighter(base, share=index / max(len(labels) - 1, 1))
    return colours


def _lighter(colour: str, *, share: float) -> str:
    """``share`` of the way to halfway between the colour and white."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + share / 2 * (255 - part)):02x}" for part in parts)
