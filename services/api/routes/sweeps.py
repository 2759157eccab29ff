"""Sweeps: submit, check, list, show, cancel."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Response

from services.api.body import SWEEP_BODY, read_sweep
from services.api.dependencies import Cursor, Limit, ProbeHere, QueueHere, ReconcilerHere, SettingsHere, StoreHere
from services.api.preflight import check_sweep
from services.contract.records import PlannedRun, RunPage, SweepPage, SweepPlan, SweepRecord
from services.contract.spec import SweepSpec, expand

router = APIRouter(tags=["sweeps"])
Body = Annotated[SweepSpec, Depends(read_sweep)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=200, description="The same key makes the same sweep, once."
    ),
]


@router.post("/sweeps", status_code=201, openapi_extra=SWEEP_BODY)
def submit_sweep(
    spec: Body,
    response: Response,
    settings: SettingsHere,
    store: StoreHere,
    queue: QueueHere,
    reconciler: ReconcilerHere,
    probe: ProbeHere,
    idempotency_key: IdempotencyKey = None,
) -> SweepRecord:
    """Check a sweep, store it with all its runs, and queue them."""
    sweep = store.find_sweep(spec, idempotency_key=idempotency_key) if idempotency_key else None
    # A sweep that was made is made: asking again must not fail because its teacher has gone since.
    if sweep is None:
        check_sweep(spec, settings=settings, probe=probe)
        queue.ping()
        sweep = store.create_sweep(spec, idempotency_key=idempotency_key)
        reconciler.wake()
    response.headers["Location"] = f"/v1/sweeps/{sweep.id}"
    return sweep


@router.post("/sweeps:validate", openapi_extra=SWEEP_BODY)
def validate_sweep(spec: Body, settings: SettingsHere, probe: ProbeHere) -> SweepPlan:
    """Check a sweep and show the runs it stands for; nothing is stored."""
    check_sweep(spec, settings=settings, probe=probe)
    return SweepPlan(
        name=spec.name,
        runs=[
            PlannedRun(
                key=run.key,
                method=run.method,
                alpha=run.alpha,
                learning_rate=run.learning_rate,
                batch_size=run.batch_size,
                seed=run.seed,
            )
            for run in expand(spec)
        ],
    )


@router.get("/sweeps")
def list_sweeps(store: StoreHere, limit: Limit = 50, cursor: Cursor = None) -> SweepPage:
    """All sweeps, newest first."""
    return store.sweeps(limit=limit, cursor=cursor)


@router.get("/sweeps/{sweep_id}")
def get_sweep(sweep_id: str, store: StoreHere) -> SweepRecord:
    """One sweep and the number of its runs in each state."""
    return store.sweep(sweep_id)


@router.get("/sweeps/{sweep_id}/runs")
def list_runs(sweep_id: str, store: StoreHere, limit: Limit = 50, cursor: Cursor = None) -> RunPage:
    """A sweep's runs with their stages: alpha varies slowest, seed fastest."""
    return store.runs(sweep_id, limit=limit, cursor=cursor)


@router.post("/sweeps/{sweep_id}/cancel", status_code=202)
def cancel_sweep(sweep_id: str, store: StoreHere) -> SweepRecord:
    """Stop a sweep: what is queued will not start, what is running ends soon."""
    return store.request_cancel(sweep_id)
