"""What routes work with, as parameters."""

from typing import Annotated

from fastapi import Depends, Query, Request

from services.api.evidence import Ranking, Reporting
from services.api.preflight import TeacherProbe
from services.contract.settings import Settings
from services.store.pages import MAX_LIMIT
from services.store.queue import Queue
from services.store.reconciler import Reconciler
from services.store.store import Store


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _queue(request: Request) -> Queue:
    queue: Queue = request.app.state.queue
    return queue


def _reconciler(request: Request) -> Reconciler:
    reconciler: Reconciler = request.app.state.reconciler
    return reconciler


def _probe(request: Request) -> TeacherProbe:
    probe: TeacherProbe = request.app.state.probe
    return probe


def _ranking(request: Request) -> Ranking:
    ranking: Ranking = request.app.state.ranking
    return ranking


def _reporting(request: Request) -> Reporting:
    reporting: Reporting = request.app.state.reporting
    return reporting


SettingsHere = Annotated[Settings, Depends(_settings)]
StoreHere = Annotated[Store, Depends(_store)]
QueueHere = Annotated[Queue, Depends(_queue)]
ReconcilerHere = Annotated[Reconciler, Depends(_reconciler)]
ProbeHere = Annotated[TeacherProbe, Depends(_probe)]
RankingHere = Annotated[Ranking, Depends(_ranking)]
ReportingHere = Annotated[Reporting, Depends(_reporting)]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Most items on a page.")]
Cursor = Annotated[str | None, Query(max_length=500, description="next_cursor of the page before.")]
