"""Server-sent events from a real server, while a real store changes."""

import asyncio
import queue as queues
import threading
from collections.abc import Iterator

import httpx
import pytest

from services.api.routes.events import follow
from services.contract.api_client import ApiClient
from services.contract.errors import ApiUnavailableError
from services.contract.event_stream import parse_event_stream
from services.contract.records import Problem, SweepEvent
from services.contract.spec import SweepSpec
from services.contract.states import State
from services.store.store import Store
from tests.api.conftest import make_spec

WAIT = 10
"""Seconds until something that should happen counts as not happening."""


class Listener:
    """Collects the events of a sweep in a thread."""

    def __init__(self, api: ApiClient, sweep_id: str) -> None:
        self.events: queues.Queue[SweepEvent | None] = queues.Queue()

        def listen() -> None:
            for event in api.events(sweep_id):
                self.events.put(event)
            self.events.put(None)

        threading.Thread(target=listen, daemon=True).start()

    def next(self) -> SweepEvent | None:
        return self.events.get(timeout=WAIT)


@pytest.fixture
def small() -> SweepSpec:
    return make_spec(grid={"alpha": [0, 1]}, evaluation={})


def test_events_tell_what_changed_until_the_sweep_has_ended(api: ApiClient, store: Store, small: SweepSpec) -> None:
    sweep = api.submit_sweep(small)
    sft, kd = api.all_runs(sweep.id)
    listener = Listener(api, sweep.id)

    first = listener.next()
    assert first is not None
    assert (first.state, first.runs) == (State.QUEUED, {State.QUEUED: 2})
    assert [(run.id, run.method, run.state) for run in first.changed] == [
        (sft.id, "SFT", State.QUEUED),
        (kd.id, "KD alpha=1", State.QUEUED),
    ]

    attempt = store.begin_attempt(sft.stages[0].id, worker="w", lease_seconds=60)
    assert attempt is not None
    event = listener.next()
    assert event is not None
    assert (event.state, [(run.id, run.state) for run in event.changed]) == (State.RUNNING, [(sft.id, State.RUNNING)])

    store.set_progress(attempt, 0.5)
    event = listener.next()
    assert event is not None
    assert [(run.id, run.progress) for run in event.changed] == [(sft.id, 0.5)]

    problem = Problem(reason="training", what="the loss is not finite", fix="Lower the learning rate.")
    store.end_attempt(attempt, State.FAILED, problem=problem)
    event = listener.next()
    assert event is not None
    assert [(run.state, run.problem) for run in event.changed] == [(State.FAILED, problem)]

    store.request_cancel(sweep.id)
    event = listener.next()
    assert event is not None
    assert (event.state, event.cancel_requested) == (State.FAILED, True)
    assert event.runs == {State.FAILED: 1, State.CANCELLED: 1}
    assert listener.next() is None


def test_other_sweeps_are_not_heard(api: ApiClient, store: Store, small: SweepSpec) -> None:
    sweep, other = api.submit_sweep(small), api.submit_sweep(small)
    listener = Listener(api, sweep.id)
    assert listener.next() is not None
    before = store.change_counter()
    api.cancel_sweep(other.id)
    assert store.change_counter() > before
    api.cancel_sweep(sweep.id)
    event = listener.next()
    assert event is not None
    assert event.state == State.CANCELLED


def test_the_stream_of_an_ended_sweep_ends(api: ApiClient, small: SweepSpec) -> None:
    sweep = api.cancel_sweep(api.submit_sweep(small).id)
    url = f"{api.url}/v1/sweeps/{sweep.id}/events"
    ((event_id, data),) = parse_event_stream(iter(httpx.get(url, timeout=WAIT).text.splitlines()))
    assert SweepEvent.model_validate_json(data).state == State.CANCELLED
    again = httpx.get(url, headers={"Last-Event-ID": event_id}, timeout=WAIT)
    assert list(parse_event_stream(iter(again.text.splitlines()))) == []


def test_the_last_event_id_is_honoured(api: ApiClient, store: Store, small: SweepSpec) -> None:
    sweep = api.submit_sweep(small)

    def connect(last: str) -> Iterator[tuple[str, str]]:
        headers = {"Last-Event-ID": last} if last else {}
        with httpx.stream("GET", f"{api.url}/v1/sweeps/{sweep.id}/events", headers=headers, timeout=WAIT) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            yield from parse_event_stream(response.iter_lines())

    event_id, data = next(connect(""))
    assert next(connect("of another time")) == (event_id, data)

    assert SweepEvent.model_validate_json(data).changed


def test_nothing_is_said_twice_to_one_who_comes_back(store: Store, small: SweepSpec) -> None:
    sweep = store.create_sweep(small)

    async def come_back() -> SweepEvent:
        first = await anext(follow(store, sweep.id))
        events = follow(CountingStore(store), sweep.id, last_event_id=first.id, poll_seconds=0.01)  # type: ignore[arg-type]
        second = asyncio.ensure_future(anext(events))
        async with asyncio.timeout(WAIT):
            while CountingStore.asked < 3:
                await asyncio.sleep(0.01)
            assert not second.done()
            assert store.begin_attempt(store.ready_stages()[0].id, worker="w", lease_seconds=60)
            return SweepEvent.model_validate_json((await second).data)

    event = asyncio.run(come_back())
    assert event.state == State.RUNNING
    assert [run.method for run in event.changed] == ["SFT"]


class CountingStore:
    """A store that counts how often it was asked for changes."""

    asked = 0

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getattr__(self, name: str) -> object:
        CountingStore.asked += name == "change_counter"
        return getattr(self.store, name)


def test_heartbeats_keep_the_line_open(api: ApiClient, monkeypatch: pytest.MonkeyPatch, small: SweepSpec) -> None:
    monkeypatch.setattr("services.api.routes.events.HEARTBEAT_SECONDS", 0.1)
    sweep = api.submit_sweep(small)
    with httpx.stream("GET", f"{api.url}/v1/sweeps/{sweep.id}/events", timeout=WAIT) as response:
        comments = (line for line in response.iter_lines() if line.startswith(":"))
        assert [next(comments)[:6] for _ in range(2)] == [": ping", ": ping"]


def test_a_broken_connection_is_taken_up_again(api: ApiClient, store: Store, small: SweepSpec) -> None:
    sweep = api.submit_sweep(small)
    stream, cut, sent = api._stream, [False], []

    def cutting(sweep_id: str, last_event_id: str) -> Iterator[tuple[str, str]]:
        sent.append(last_event_id)
        for event in stream(sweep_id, last_event_id):
            yield event
            if not cut[0]:
                cut[0] = True
                raise httpx.ReadError("the cable is out")

    api._stream = cutting  # type: ignore[method-assign]
    events = api.events(sweep.id)
    first = next(events)
    store.request_cancel(sweep.id)
    last = next(events)
    assert (first.state, last.state) == (State.QUEUED, State.CANCELLED)
    assert sent[0] == ""
    assert sent[1]
    assert list(events) == []


def test_a_lost_api_is_given_up_on(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("services.contract.api_client.time.sleep", waits.append)
    with pytest.raises(ApiUnavailableError, match="no API answers"), ApiClient("http://127.0.0.1:1") as client:
        next(client.events("sw-1"))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]
