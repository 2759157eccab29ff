"""Submitting, listing and cancelling sweeps over HTTP."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from services.api.app import create_app
from services.contract.api_client import ApiClient
from services.contract.errors import (
    ConflictError,
    NotFoundError,
    QueueUnavailableError,
    SpecError,
    TeacherUnavailableError,
)
from services.contract.settings import Settings
from services.contract.spec import SweepSpec, expand
from services.contract.states import State
from services.store.queue import Queue, job_id
from services.store.reconciler import Reconciler
from services.store.store import Store
from tests.api.conftest import make_spec, running

YAML = """\
name: from-yaml
teacher: {model: big-teacher}
student: {model: owner/small-student}
dataset: {path: demo_instructions}
grid: {alpha: [0, 1.0], learning_rate: [1e-5]}
"""


def unreachable(*_: object, **__: object) -> None:
    raise TeacherUnavailableError("no teacher answers at 10.0.0.9:8442", fix="Start it.")


def test_a_submitted_sweep_is_stored_with_its_runs(api: ApiClient, store: Store, spec: SweepSpec) -> None:
    sweep = api.submit_sweep(spec)
    assert sweep.spec == spec
    assert sweep.runs == {State.QUEUED: 4}
    assert api.sweep(sweep.id) == sweep == store.sweep(sweep.id)
    runs = api.all_runs(sweep.id)
    assert [run.spec for run in runs] == expand(spec)
    assert api.run(runs[2].id) == runs[2]


def test_yaml_and_json_make_the_same_sweep(api: ApiClient) -> None:
    from_yaml = api.submit_yaml(YAML)
    assert from_yaml.spec.grid.learning_rate == (1e-5,)
    assert api.submit_sweep(from_yaml.spec).spec == from_yaml.spec


def test_created_says_where(api: ApiClient) -> None:
    response = httpx.post(f"{api.url}/v1/sweeps", content=YAML, headers={"Content-Type": "application/yaml"})
    assert response.status_code == 201
    assert response.headers["Location"] == f"/v1/sweeps/{response.json()['id']}"
    assert httpx.get(api.url + response.headers["Location"]).json() == response.json()


def test_checking_stores_nothing(api: ApiClient, store: Store, spec: SweepSpec) -> None:
    plan = api.check_sweep(spec)
    assert [(run.key, run.method, run.alpha, run.seed) for run in plan.runs] == [
        (run.key, run.method, run.alpha, run.seed) for run in expand(spec)
    ]
    assert api.check_yaml(YAML).name == "from-yaml"
    assert store.sweeps().items == []


def test_a_wrong_specification_names_every_field(api: ApiClient, store: Store) -> None:
    text = YAML.replace("alpha: [0, 1.0]", "alpha: [-1], alfa: 2").replace("student:", "studnt:")
    for submit in (api.submit_yaml, api.check_yaml):
        with pytest.raises(SpecError) as caught:
            submit(text)
        assert "grid.alpha.0: -1: Input should be greater than or equal to 0" in caught.value.what
        assert "grid.alfa: unknown field; did you mean alpha?" in caught.value.what
        assert "student: is missing" in caught.value.what
        assert len(caught.value.details) == 4
    assert store.sweeps().items == []


def test_an_unreachable_teacher_stops_the_submission(
    api: ApiClient, store: Store, monkeypatch: pytest.MonkeyPatch, spec: SweepSpec
) -> None:
    monkeypatch.setattr("services.api.preflight.grpc.insecure_channel", unreachable)
    with pytest.raises(TeacherUnavailableError, match=r"10\.0\.0\.9:8442"):
        api.submit_sweep(spec)
    assert store.sweeps().items == []


def test_one_idempotency_key_makes_one_sweep(api: ApiClient, store: Store, spec: SweepSpec) -> None:
    limits = httpx.Limits(max_connections=50)
    with httpx.Client(base_url=api.url, limits=limits, timeout=60) as http, ThreadPoolExecutor(50) as threads:

        def post(_: int) -> httpx.Response:
            headers = {"Content-Type": "application/json", "Idempotency-Key": "once"}
            return http.post("/v1/sweeps", content=spec.model_dump_json(), headers=headers)

        responses = list(threads.map(post, range(200)))

    assert {response.status_code for response in responses} == {201}
    assert len({response.json()["id"] for response in responses}) == 1
    assert len(store.sweeps().items) == 1


def test_what_was_submitted_is_found_again_though_the_teacher_has_gone(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch, spec: SweepSpec
) -> None:
    first = api.submit_sweep(spec, idempotency_key="k")
    monkeypatch.setattr("services.api.preflight.grpc.insecure_channel", unreachable)
    assert api.submit_sweep(spec, idempotency_key="k") == first
    with pytest.raises(TeacherUnavailableError):
        api.submit_sweep(spec)


def test_submitted_work_is_queued_at_once(
    serve: Callable[..., str], queue: Queue, monkeypatch: pytest.MonkeyPatch, spec: SweepSpec
) -> None:
    # Left to itself the reconciler would look again in an hour.
    monkeypatch.setattr("services.api.app.Reconciler", partial(Reconciler, interval_seconds=3600))
    with ApiClient(serve()) as api:
        runs = api.all_runs(api.submit_sweep(spec).id)
    wanted = {job_id(run.stages[0].id, 1) for run in runs}
    deadline = time.monotonic() + 10
    while queue.waiting() != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert queue.waiting() == wanted


def test_without_a_queue_nothing_is_stored(store: Store, settings: Settings, tmp_path: Path, spec: SweepSpec) -> None:
    queue = Queue(f"unix://{tmp_path}/nothing.sock", retry_seconds=0)
    with running(create_app(settings, store, queue)) as url, ApiClient(url) as api:
        with pytest.raises(QueueUnavailableError, match=r"nothing\.sock"):
            api.submit_sweep(spec)
        assert api.sweeps().items == []


def test_a_key_belongs_to_its_specification(api: ApiClient, spec: SweepSpec) -> None:
    first = api.submit_sweep(spec, idempotency_key="k")
    assert api.submit_sweep(spec, idempotency_key="k") == first
    assert api.submit_sweep(spec).id != first.id
    with pytest.raises(ConflictError, match="another specification"):
        api.submit_sweep(make_spec(name="other"), idempotency_key="k")


def test_pages_follow_each_other(api: ApiClient, spec: SweepSpec) -> None:
    made = [api.submit_sweep(spec).id for _ in range(5)]
    seen, cursor = [], None
    while True:
        page = api.sweeps(limit=2, cursor=cursor)
        assert len(page.items) <= 2
        seen += [sweep.id for sweep in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == made[::-1]
    page = api.runs(made[0], limit=3)
    rest = api.runs(made[0], limit=3, cursor=page.next_cursor)
    assert [run.spec for run in page.items + rest.items] == expand(spec)


def test_cancelling_ends_what_is_queued(api: ApiClient, spec: SweepSpec) -> None:
    sweep = api.submit_sweep(spec)
    assert api.cancel_sweep(sweep.id).cancel_requested
    assert api.sweep(sweep.id).state == State.CANCELLED
    assert api.sweep(sweep.id).runs == {State.CANCELLED: 4}


def test_unknown_ids(api: ApiClient) -> None:
    asks = [api.sweep, api.runs, api.cancel_sweep, api.summary, api.case_studies]
    asks += [api.run, api.metrics, api.generations, api.scores, api.artifacts]
    for ask in asks:
        with pytest.raises(NotFoundError, match=r"there is no (sweep|run) sw-none"):
            ask("sw-none")
    with pytest.raises(NotFoundError):
        next(api.events("sw-none"))
