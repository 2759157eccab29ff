"""Sweeps for tests, and the short way through their stages."""

from typing import Any

from services.contract.records import SweepRecord
from services.contract.spec import SweepSpec
from services.contract.states import State
from services.store.store import Attempt, Store


def example_sweep(**changes: Any) -> SweepSpec:
    """Two runs (SFT and KD) that train and are evaluated, unless changed."""
    fields: dict[str, Any] = {
        "name": "example",
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "dataset": {"path": "demo_instructions"},
        "grid": {"alpha": [0, 0.1]},
        "evaluation": {"benchmarks": ["demo_news"]},
    }
    return SweepSpec.model_validate({**fields, **changes})


def begin(store: Store, stage_id: str, *, lease_seconds: float = 60.0) -> Attempt:
    attempt = store.begin_attempt(stage_id, worker="worker", lease_seconds=lease_seconds)
    assert attempt is not None, f"{stage_id} could not be begun"
    return attempt


def finish(store: Store, stage_id: str) -> None:
    store.end_attempt(begin(store, stage_id), State.SUCCEEDED)


def stage_ids(store: Store, sweep: SweepRecord, *, run: int = 0) -> list[str]:
    return [stage.id for stage in store.runs(sweep.id).items[run].stages]
