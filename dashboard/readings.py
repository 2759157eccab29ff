"""The metrics of runs, read once: what a visit has is kept, and only what is new is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import streamlit as st

from dashboard.session import client
from services.contract.records import MetricPoint, RunRecord
from services.contract.states import ENDED


@dataclass
class Reading:
    """What is known of one run's metrics."""

    attempts: tuple[int, ...]
    complete: bool = False
    points: dict[tuple[str, int], MetricPoint] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max((step for _, step in self.points), default=-1)


def read_metrics(runs: Sequence[RunRecord]) -> dict[str, list[MetricPoint]]:
    """All points logged so far, by run id.

    A run that has ended is read once more and then never again; a new attempt, which may repeat steps, from its start.
    """
    kept: dict[str, Reading] = st.session_state.get("readings", {})
    readings = {run.id: _read(run, kept.get(run.id)) for run in runs}
    st.session_state["readings"] = readings
    return {run_id: list(reading.points.values()) for run_id, reading in readings.items()}


def _read(run: RunRecord, known: Reading | None) -> Reading:
    attempts = tuple(stage.attempt for stage in run.stages)
    reading = known if known is not None and known.attempts == attempts else Reading(attempts=attempts)
    if reading.complete or not any(attempts):
        return reading
    # The newest step is read again: it may have been seen before all of its metrics were written.
    for point in client().metrics(run.id, after_step=max(reading.last_step - 1, -1)):
        reading.points[point.name, point.step] = point
    reading.complete = run.state in ENDED
    return reading
