"""Creating and listing sweeps and runs."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import pytest
from sqlalchemy import event

from services.contract.errors import ConflictError, InvalidInputError, NotFoundError
from services.contract.spec import expand
from services.contract.states import StageKind, State
from services.store import sweeps
from services.store.store import Store
from tests.store.examples import begin, example_sweep, finish, stage_ids

THOUSAND = {
    "alpha": [0, 0.1],
    "learning_rate": [step * 1e-5 for step in range(1, 51)],
    "seed": list(range(10)),
}


def test_a_sweep_is_stored_with_its_runs_in_the_order_of_expand(store: Store) -> None:
    spec = example_sweep(grid={"alpha": [0, 0.1, 1], "seed": [0, 1]})
    before = time.time()
    sweep = store.create_sweep(spec)
    assert sweep == store.sweep(sweep.id)
    assert (sweep.name, sweep.spec, sweep.state, sweep.runs) == ("example", spec, State.QUEUED, {State.QUEUED: 6})
    assert not sweep.cancel_requested
    assert before - 1 < sweep.created_at.timestamp() < time.time() + 1
    runs = store.runs(sweep.id).items
    assert [run.spec for run in runs] == expand(spec)
    assert [run.id for run in runs] == [f"{sweep.id}-{run.key[:8]}" for run in expand(spec)]
    assert [run.method for run in runs[:3]] == ["SFT", "SFT", "KD alpha=0.1"]
    assert runs[4] == store.run(runs[4].id)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, ["train", "evaluate"]),
        ({"evaluation": {}}, ["train"]),
        ({"distillation": {"level": "word+sequence"}}, ["decode", "train", "evaluate"]),
        ({"distillation": {"level": "sequence"}, "grid": {"alpha": 0}, "evaluation": {}}, ["decode", "train"]),
    ],
)
def test_a_run_has_the_stages_its_spec_asks_for(sqlite_store: Store, changes: dict, kinds: list[str]) -> None:
    sweep = sqlite_store.create_sweep(example_sweep(**changes))
    run = sqlite_store.runs(sweep.id).items[0]
    assert [stage.kind for stage in run.stages] == kinds
    for earlier, later in pairwise(run.stages):
        assert sqlite_store.stage_inputs(later.id) == [earlier]
    assert sqlite_store.stage_inputs(run.stages[0].id) == []


def test_runs_of_a_sweep_share_one_decode(store: Store) -> None:
    spec = example_sweep(distillation={"level": "word+sequence"})
    sweep = store.create_sweep(spec)
    first, second = store.runs(sweep.id).items
    decode = first.stages[0]
    assert decode == second.stages[0]
    assert decode.run_id is None
    assert store.stage_key(decode.id) == expand(spec)[0].decode_key
    assert store.stage_key(first.stages[1].id) == expand(spec)[0].key
    assert [stage.id for stage in store.ready_stages()] == [decode.id]


def test_runs_of_a_sweep_share_one_fine_tuning_which_comes_first(store: Store) -> None:
    spec = example_sweep(
        teacher={"model": "teacher", "finetune": {"method": "lora"}},
        distillation={"level": "word+sequence"},
        grid={"alpha": [0.1, 1.0]},
    )
    first, second = store.runs(store.create_sweep(spec).id).items
    kinds = ["finetune_teacher", "decode", "train", "evaluate"]
    assert [stage.kind for stage in first.stages] == kinds
    finetune, decode = first.stages[:2]
    assert second.stages[:2] == [finetune, decode]
    assert finetune.run_id is None
    assert store.stage_key(finetune.id) == expand(spec)[0].finetune_key
    assert [stage.id for stage in store.ready_stages()] == [finetune.id]
    assert store.stage_inputs(decode.id) == [finetune]
    finish(store, finetune.id)
    assert [stage.id for stage in store.ready_stages()] == [decode.id]


def test_only_runs_that_ask_the_teacher_wait_for_its_fine_tuning(store: Store) -> None:
    spec = example_sweep(teacher={"model": "teacher", "finetune": {}}, evaluation={})
    sft, distilled = store.runs(store.create_sweep(spec).id).items
    assert [stage.kind for stage in sft.stages] == ["train"]
    assert [stage.kind for stage in distilled.stages] == ["finetune_teacher", "train"]
    assert {stage.kind for stage in store.ready_stages()} == {"train", "finetune_teacher"}


def test_decodes_depend_on_teacher_dataset_and_length_alone() -> None:
    def key(**changes: object) -> str | None:
        return expand(example_sweep(distillation={"level": "word+sequence"}, **changes))[0].decode_key

    assert key() == key(name="other", grid={"alpha": 5, "seed": 3}, evaluation={}, student={"model": "another"})
    changed = [
        key(teacher={"model": "other"}),
        key(teacher={"model": "teacher", "revision": "1"}),
        key(dataset={"path": "demo_instructions", "limit": 5}),
        key(training={"max_length": 512}),
    ]
    assert len({key(), *changed}) == 5
    assert expand(example_sweep())[1].decode_key is None


def test_a_thousand_runs_take_no_more_statements_than_two(store: Store) -> None:
    """How long they take is for benchmarks/api_sweep.py to say."""
    asked = []
    for grid, runs in ({"alpha": [0, 0.1]}, 2), (THOUSAND, 1000):
        with counted_queries(store, kinds=("SELECT", "INSERT", "UPDATE")) as queries:
            sweep = store.create_sweep(example_sweep(grid=grid))
        assert sweep.runs == {State.QUEUED: runs}
        asked.append(len(queries))
    assert asked[0] == asked[1]
    assert len(store.runs(sweep.id, limit=1000).items) == 1000


def test_listing_takes_the_same_queries_however_many_there_are(store: Store) -> None:
    small = store.create_sweep(example_sweep(grid={"alpha": 0}))
    large = store.create_sweep(example_sweep(grid={"alpha": 0.1, "seed": list(range(200))}))
    counts = []
    for sweep in (small, large):
        with counted_queries(store) as queries:
            store.runs(sweep.id, limit=1000)
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 4
    for _ in range(20):
        store.create_sweep(example_sweep())
    with counted_queries(store) as queries:
        assert len(store.sweeps().items) == 22
    assert len(queries) == 2


def test_pages_of_runs_and_sweeps_hold_each_once_in_order(store: Store) -> None:
    created = [store.create_sweep(example_sweep(name=f"sweep-{number}")).id for number in range(5)]
    assert created == sorted(created)
    found, cursor = [], None
    while True:
        page = store.sweeps(limit=2, cursor=cursor)
        found += [sweep.id for sweep in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == created[::-1]

    sweep = store.create_sweep(example_sweep(grid={"alpha": 0.1, "seed": list(range(5))}))
    pages = [store.runs(sweep.id, limit=2)]
    while pages[-1].next_cursor:
        pages.append(store.runs(sweep.id, limit=2, cursor=pages[-1].next_cursor))
    assert [len(page.items) for page in pages] == [2, 2, 1]
    assert [run.spec.seed for page in pages for run in page.items] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cursor", ["nonsense", "", "WzFd", "W10", "bnVsbA", "é", "A"])
def test_a_foreign_cursor_is_refused(sqlite_store: Store, cursor: str) -> None:
    with pytest.raises(InvalidInputError, match="is not a cursor of this list"):
        sqlite_store.sweeps(cursor=cursor)


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_limit_out_of_bounds_is_refused(sqlite_store: Store, limit: int) -> None:
    with pytest.raises(InvalidInputError, match="between 1 and 1000"):
        sqlite_store.sweeps(limit=limit)


def test_what_does_not_exist_is_not_found(store: Store) -> None:
    for call in (store.sweep, store.runs, store.request_cancel):
        with pytest.raises(NotFoundError, match="no sweep nothing"):
            call("nothing")
    for call in (store.run, store.metrics, store.generations, store.scores, store.artifacts):
        with pytest.raises(NotFoundError, match="no run nothing"):
            call("nothing")
    for call in (store.stage, store.stage_key):
        with pytest.raises(NotFoundError, match="no stage nothing"):
            call("nothing")
    with pytest.raises(NotFoundError, match="no stage nothing"):
        store.begin_attempt("nothing", worker="worker", lease_seconds=1)


def test_one_idempotency_key_makes_one_sweep(store: Store) -> None:
    first = store.create_sweep(example_sweep(), idempotency_key="key")
    finish(store, stage_ids(store, first)[0])
    again = store.create_sweep(example_sweep(), idempotency_key="key")
    assert (again.id, again.state) == (first.id, State.RUNNING)
    assert store.create_sweep(example_sweep(), idempotency_key="other").id != first.id
    assert store.create_sweep(example_sweep()).id != store.create_sweep(example_sweep()).id
    with pytest.raises(ConflictError, match=f"'key' already made sweep {first.id}"):
        store.create_sweep(example_sweep(name="changed"), idempotency_key="key")
    for key in ("", "x" * 256):
        with pytest.raises(InvalidInputError, match="1 to 255 characters"):
            store.create_sweep(example_sweep(), idempotency_key=key)


def test_200_concurrent_creations_with_one_key_make_one_sweep(store: Store) -> None:
    with ThreadPoolExecutor(50) as pool:
        made = list(pool.map(lambda _: store.create_sweep(example_sweep(), idempotency_key="key").id, range(200)))
    assert len(set(made)) == 1
    assert len(store.sweeps().items) == 1
    assert len(store.ready_stages()) == 2


def test_concurrent_processes_with_one_key_make_one_sweep(store: Store, database_url: str) -> None:
    code = (
        "import sys; from services.store.store import Store; from tests.store.examples import example_sweep\n"
        "store = Store(sys.argv[1])\n"
        "for key in range(20): print(store.create_sweep(example_sweep(), idempotency_key=str(key)).id)"
    )
    creating = [subprocess.Popen([sys.executable, "-c", code, database_url], stdout=subprocess.PIPE) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in creating]
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(store.sweeps().items) == 20


def test_a_sweep_is_created_whole_or_not_at_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sweeps._plan

    def broken_plan(*args: object) -> dict:
        rows = plan(*args)
        rows["stage_needs"].append({"stage_id": "nothing", "needs_id": "nothing"})
        return rows

    monkeypatch.setattr(sweeps, "_plan", broken_plan)
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        store.create_sweep(example_sweep(), idempotency_key="key")
    monkeypatch.undo()
    assert store.sweeps().items == []
    assert store.ready_stages() == []
    assert store.change_counter() == 0
    assert store.create_sweep(example_sweep(), idempotency_key="key").runs == {State.QUEUED: 2}


def test_run_ids_stay_distinct_when_keys_begin_alike() -> None:
    assert sweeps._shortened(["0123456789abcdef", "fedcba9876543210"]) == ["01234567", "fedcba98"]
    assert sweeps._shortened(["0123456789abcdef", "01234567ffffffff"]) == ["0123456789abcdef", "01234567ffffffff"]


def test_progress_is_the_mean_over_stages(store: Store) -> None:
    sweep = store.create_sweep(example_sweep())
    train, evaluate = stage_ids(store, sweep)
    run_id = store.runs(sweep.id).items[0].id
    assert store.run(run_id).progress == 0
    attempt = begin(store, train)
    store.set_progress(attempt, 0.5)
    assert store.run(run_id).progress == 0.25
    store.set_progress(attempt, 7)
    assert store.run(run_id).progress == 0.5
    store.set_progress(attempt, 0.9)
    store.end_attempt(attempt, State.SUCCEEDED)
    assert store.run(run_id).progress == 0.5
    finish(store, evaluate)
    assert store.run(run_id).progress == 1
    assert store.run(run_id).stages[1].kind == StageKind.EVALUATE


@contextmanager
def counted_queries(store: Store, *, kinds: tuple[str, ...] = ("SELECT",)) -> Iterator[list[str]]:
    queries: list[str] = []

    def count(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.lstrip().startswith(kinds):
            queries.append(statement)

    engine = store._database._engine
    event.listen(engine, "before_cursor_execute", count)
    yield queries
    event.remove(engine, "before_cursor_execute", count)
