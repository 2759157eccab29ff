"""Server-sent events: a sweep's progress while it goes on."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse, ServerSentEvent

from services.api.dependencies import StoreHere
from services.api.document import reference
from services.api.evidence import read_runs
from services.contract.errors import SmoothKDError
from services.contract.records import RunStatus, SweepEvent, SweepRecord
from services.contract.spec import content_key
from services.contract.states import ENDED
from services.store.store import Store

log = logging.getLogger(__name__)
router = APIRouter(tags=["sweeps"])
POLL_SECONDS = 0.5
SHARE = 10
"""A connection pauses this many times as long as it read, so that a sweep of 1,000 runs cannot fill a processor."""
HEARTBEAT_SECONDS = 15


@router.get(
    "/sweeps/{sweep_id}/events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "Each event's data is a SweepEvent.",
            "content": {"text/event-stream": {"schema": reference(SweepEvent)}},
        }
    },
)
async def watch_sweep(
    sweep_id: str, store: StoreHere, last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None
) -> EventSourceResponse:
    """Where the sweep stands, and again whenever that changed, until it has ended.

    The first event tells of every run, later ones of those that changed. An event's id stands for the state it
    told: a client that comes back with it as Last-Event-ID hears nothing until something has changed since.
    """
    await run_in_threadpool(store.sweep, sweep_id)
    return EventSourceResponse(follow(store, sweep_id, last_event_id=last_event_id), ping=HEARTBEAT_SECONDS)


async def follow(
    store: Store, sweep_id: str, *, last_event_id: str | None = None, poll_seconds: float = POLL_SECONDS
) -> AsyncIterator[ServerSentEvent]:
    """The events of one connection. Between changes it reads a single number from the store."""
    counter, told_id, told, pause = -1, last_event_id, dict[str, RunStatus](), poll_seconds
    while True:
        try:
            now = await run_in_threadpool(store.change_counter)
            if now != counter:
                counter, started = now, time.monotonic()
                sweep, runs = await run_in_threadpool(_read, store, sweep_id)
                event_id = _event_id(sweep, runs)
                if event_id != told_id:
                    event = _event(sweep, [run for run in runs if told.get(run.id) != run])
                    yield ServerSentEvent(event.model_dump_json(), event="sweep", id=event_id)
                told_id, told = event_id, {run.id: run for run in runs}
                pause = max(poll_seconds, SHARE * (time.monotonic() - started))
                if sweep.state in ENDED:
                    return
        except SmoothKDError as error:
            # The answer has begun and cannot become a problem any more; the client comes back and is told then.
            log.warning("the events of sweep %s stop: %s", sweep_id, error.what)
            return
        await asyncio.sleep(pause)


def _read(store: Store, sweep_id: str) -> tuple[SweepRecord, list[RunStatus]]:
    # The sweep first: what is read of its runs is then never older, so an ended sweep comes with ended runs.
    sweep = store.sweep(sweep_id)
    runs = [
        RunStatus(
            id=run.id,
            method=run.method,
            state=run.state,
            cancel_requested=run.cancel_requested,
            progress=run.progress,
            problem=run.problem,
        )
        for run in read_runs(store, sweep_id)
    ]
    return sweep, runs


def _event(sweep: SweepRecord, changed: list[RunStatus]) -> SweepEvent:
    return SweepEvent(
        sweep_id=sweep.id,
        state=sweep.state,
        cancel_requested=sweep.cancel_requested,
        runs=sweep.runs,
        changed=changed,
    )


def _event_id(sweep: SweepRecord, runs: list[RunStatus]) -> str:
    return content_key(_event(sweep, runs).model_dump(mode="json"))
