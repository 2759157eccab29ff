"""A small real API on loopback that serves a ``World``; for tests, and to look at the dashboard without the platform.

    python -m tests.dashboard.fake_api [populated|paper|empty|live] [PORT]

``live`` lets the running sweep move on with every look at it until it ends.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from services.contract.annotation_records import Annotation, AnnotationList, NewAnnotation
from services.contract.errors import AuthenticationError, NotFoundError, SmoothKDError, StoreUnavailableError
from services.contract.problems import MEDIA_TYPE, describe
from services.contract.records import (
    CaseStudyPage,
    MetricList,
    PlannedRun,
    Record,
    RunPage,
    Summary,
    SweepPage,
    SweepPlan,
    SweepRecord,
)
from services.contract.spec import SweepSpec, expand
from services.contract.spec_reading import parse_sweep
from services.contract.states import State
from services.reports.annotation import annotator_agreement, judged_outputs
from tests.dashboard.seed import World, make_metrics, make_summary, paper_sized, populated
from tests.dashboard.seed_studies import by_metric, make_studies


class FakeApi:
    """``requests`` lists method and path of each request; ``failure`` is what every request is answered with;
    ``lose_answer`` lets the next submission be stored and answered with an error."""

    def __init__(self, world: World, *, key: str | None = None) -> None:
        self.world = world
        self.key = key
        self.failure: SmoothKDError | None = None
        self.lose_answer = False
        self.requests: list[str] = []
        self.annotations: dict[tuple[str, str, str, str], Annotation] = {}
        self.keys_seen: list[str] = []
        self.on_request: Callable[[], None] = lambda: None
        self.url = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.middleware("http")(self._gate)
        app.add_exception_handler(SmoothKDError, _problem)
        app.get("/v1/sweeps")(self.sweeps)
        app.post("/v1/sweeps")(self.submit)
        app.post("/v1/sweeps:validate")(self.check)
        app.get("/v1/sweeps/{sweep_id}")(self.sweep)
        app.post("/v1/sweeps/{sweep_id}/cancel")(self.cancel)
        app.get("/v1/sweeps/{sweep_id}/runs")(self.runs)
        app.get("/v1/runs/{run_id}/metrics")(self.metrics)
        app.get("/v1/sweeps/{sweep_id}/summary")(self.summary)
        app.get("/v1/sweeps/{sweep_id}/case-studies")(self.case_studies)
        app.get("/v1/sweeps/{sweep_id}/report")(self.report)
        app.post("/v1/runs/{run_id}/annotations")(self.annotate)
        app.get("/v1/sweeps/{sweep_id}/annotations")(self.annotations_of)
        app.get("/v1/sweeps/{sweep_id}/annotations/agreement")(self.agreement)
        return app

    def sweeps(self, limit: int = 50, cursor: str | None = None) -> Response:
        newest_first = sorted(self.world.sweeps.values(), key=lambda sweep: sweep.created_at, reverse=True)
        return _json(_page(SweepPage, newest_first, limit=limit, cursor=cursor))

    async def submit(self, request: Request) -> Response:
        spec = parse_sweep(yaml.safe_load(await request.body()))
        key = request.headers["Idempotency-Key"]
        sweep_id = f"sw-9{len(self.keys_seen):03d}-{spec.name}"
        if key in self.keys_seen:
            return _json(next(sweep for sweep in self.world.sweeps.values() if sweep.spec == spec))
        self.keys_seen.append(key)
        self._add(sweep_id, spec)
        if self.lose_answer:
            self.lose_answer = False
            raise StoreUnavailableError("the answer was lost", fix="Submit again.")
        return _json(self.world.sweeps[sweep_id])

    async def check(self, request: Request) -> Response:
        spec = parse_sweep(yaml.safe_load(await request.body()))
        fields = ("alpha", "learning_rate", "batch_size", "seed")
        runs = [
            PlannedRun(key=run.key, method=run.method, **{name: getattr(run, name) for name in fields})
            for run in expand(spec)
        ]
        return _json(SweepPlan(name=spec.name, runs=runs))

    def sweep(self, sweep_id: str) -> Response:
        return _json(self._found(sweep_id))

    def cancel(self, sweep_id: str) -> Response:
        self._found(sweep_id)
        for index, run in enumerate(self.world.runs[sweep_id]):
            if run.state is State.QUEUED:
                self.world.set_run(sweep_id, index, State.CANCELLED)
        self.world.sweeps[sweep_id] = self.world.sweeps[sweep_id].model_copy(update={"cancel_requested": True})
        return _json(self.world.sweeps[sweep_id])

    def runs(self, sweep_id: str, limit: int = 50, cursor: str | None = None) -> Response:
        self._found(sweep_id)
        return _json(_page(RunPage, self.world.runs[sweep_id], limit=limit, cursor=cursor))

    def metrics(self, run_id: str, after_step: int = -1) -> Response:
        points = [point for point in self.world.metrics.get(run_id, []) if point.step > after_step]
        return _json(MetricList(items=points))

    def summary(self, sweep_id: str) -> Response:
        self._found(sweep_id)
        return _json(self.world.summaries[sweep_id])

    def case_studies(
        self, sweep_id: str, metric: str = "unsupported_words", limit: int = 20, cursor: str | None = None
    ) -> Response:
        self._found(sweep_id)
        studies = self.world.studies[sweep_id]
        if metric != "unsupported_words":
            studies = by_metric(studies, metric)
        return _json(_page(CaseStudyPage, studies, limit=limit, cursor=cursor))

    def annotations_of(self, sweep_id: str, annotator: str | None = None) -> Response:
        self._found(sweep_id)
        kept = [one for one in self._judged(sweep_id) if annotator in (None, one.annotator)]
        return _json(AnnotationList(items=kept))

    def annotate(self, run_id: str, annotation: NewAnnotation) -> Response:
        written = Annotation(**annotation.model_dump(), run_id=run_id, written_at=datetime.now(UTC))
        self.annotations[run_id, written.benchmark, written.item_id, written.annotator] = written
        return _json(written)

    def agreement(self, sweep_id: str) -> Response:
        self._found(sweep_id)
        texts = {
            (output.run_id, study.benchmark, study.item_id): (study.source, output.output)
            for study in self.world.studies[sweep_id]
            for output in study.outputs
        }
        return _json(annotator_agreement(judged_outputs(self._judged(sweep_id), texts)))

    def _judged(self, sweep_id: str) -> list[Annotation]:
        runs = {run.id for run in self.world.runs[sweep_id]}
        return [one for key, one in sorted(self.annotations.items()) if key[0] in runs]

    def report(self, sweep_id: str, format: str = "json") -> Response:
        self._found(sweep_id)
        return Response(f"the report of {sweep_id} as {format}", media_type="text/plain")

    async def _gate(self, request: Request, call_next: Callable[[Request], Any]) -> Response:
        self.requests.append(f"{request.method} {request.url.path}")
        self.on_request()
        if self.failure is not None:
            return _problem(request, self.failure)
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _problem(request, AuthenticationError("no API key was sent, or a wrong one", fix="Send the key."))
        response: Response = await call_next(request)
        return response

    def _found(self, sweep_id: str) -> SweepRecord:
        if sweep_id not in self.world.sweeps:
            raise NotFoundError(f"there is no sweep {sweep_id}", fix="List the sweeps with GET /v1/sweeps.")
        return self.world.sweeps[sweep_id]

    def _add(self, sweep_id: str, spec: SweepSpec) -> None:
        self.world.add(
            sweep_id, spec, [State.QUEUED] * len(expand(spec)), age=timedelta(seconds=-1 - len(self.world.sweeps))
        )
        self.world.summaries[sweep_id] = Summary(sweep_id=sweep_id, state=State.QUEUED, rows=[])
        self.world.studies[sweep_id] = []


@contextmanager
def serving(api: FakeApi, *, port: int = 0) -> Iterator[FakeApi]:
    """The API on loopback, in a thread; ``api.url`` is its address."""
    config = uvicorn.Config(
        api.app(), host="127.0.0.1", port=port, log_level="error", access_log=False, ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the fake API did not start"
        time.sleep(0.01)
    api.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield api
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def step_on(world: World, sweep_id: str) -> None:
    """What a worker does in a while: the running run trains on, ends, and gives way to the next."""
    runs = world.runs[sweep_id]
    place = next((index for index, run in enumerate(runs) if run.state in (State.RUNNING, State.QUEUED)), None)
    if place is None:
        return
    run = runs[place]
    progress = min(run.progress + 0.02, 1.0)
    state = State.SUCCEEDED if progress >= 1 else State.RUNNING
    world.set_run(sweep_id, place, state, progress=progress)
    world.metrics[run.id] = make_metrics(run, steps=int(240 * progress))
    world.summaries[sweep_id] = make_summary(sweep_id, runs, world.sweeps)
    succeeded = [other for other in runs if other.state is State.SUCCEEDED]
    if len({other.method for other in succeeded}) > 1:
        world.studies[sweep_id] = make_studies(succeeded)


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "populated"
    worlds = {"populated": populated, "paper": paper_sized, "empty": World, "live": populated}
    api = FakeApi(worlds[kind]())
    if kind == "live":
        api.on_request = lambda: step_on(api.world, "sw-0004-running")
    with serving(api, port=int(sys.argv[2]) if len(sys.argv) > 2 else 8440):
        print(f"serving {kind} at {api.url}; Ctrl-C ends it")  # noqa: T201
        threading.Event().wait()


def _page(page: Any, items: list[Any], *, limit: int, cursor: str | None) -> Record:
    start = int(cursor or 0)
    end = start + limit
    record: Record = page(items=items[start:end], next_cursor=str(end) if end < len(items) else None)
    return record


def _json(record: Record) -> Response:
    return Response(record.model_dump_json(), media_type="application/json")


def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, SmoothKDError)
    problem = describe(error, instance=request.url.path)
    return JSONResponse(problem.model_dump(), status_code=problem.status, media_type=MEDIA_TYPE)


if __name__ == "__main__":
    main()
