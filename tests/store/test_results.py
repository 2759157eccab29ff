"""Metrics, generations, scores and artifacts: written again they replace, read they come in order."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.contract.errors import InvalidInputError
from services.contract.records import Artifact, Generation, MetricPoint, Score, Span
from services.store.store import Attempt, Store
from tests.store.examples import begin, example_sweep, stage_ids


@pytest.fixture
def attempt(store: Store) -> Attempt:
    return begin(store, stage_ids(store, store.create_sweep(example_sweep()))[0])


@pytest.fixture
def run_id(store: Store, attempt: Attempt) -> str:
    run_id = store.stage(attempt.stage_id).run_id
    assert run_id
    return run_id


def point(name: str, step: int, value: float) -> MetricPoint:
    return MetricPoint(name=name, step=step, value=value)


def generation(item_id: str, *, benchmark: str = "xsum", output: str = "text") -> Generation:
    span = Span(start=0, end=4, detector="support", kind="word", score=1, explanation="not in the source")
    return Generation(
        benchmark=benchmark,
        item_id=item_id,
        source="source",
        reference="reference",
        output=output,
        scores={"rouge_l": 12.5},
        spans=[span],
    )


def test_metrics_come_back_by_name_and_step(store: Store, attempt: Attempt, run_id: str) -> None:
    store.add_metrics(attempt, [point("soft_loss", 2, 0.5), point("loss", 10, 3.0), point("loss", 2, 4.0)])
    store.add_metrics(attempt, [point("loss", 1, 5.0)])
    assert store.metrics(run_id) == [
        point("loss", 1, 5.0),
        point("loss", 2, 4.0),
        point("loss", 10, 3.0),
        point("soft_loss", 2, 0.5),
    ]
    assert store.metrics(run_id, names=["soft_loss"]) == [point("soft_loss", 2, 0.5)]
    assert store.metrics(run_id, names=[]) == []
    assert store.metrics(run_id, names=["loss"], after_step=2) == [point("loss", 10, 3.0)]


def test_a_batch_sent_again_changes_nothing_and_a_new_value_replaces(
    store: Store, attempt: Attempt, run_id: str
) -> None:
    batch = [point("loss", step, float(step)) for step in range(500)]
    store.add_metrics(attempt, batch)
    store.add_metrics(attempt, batch[100:])
    assert store.metrics(run_id) == batch
    store.add_metrics(attempt, [point("loss", 3, -1.0), point("loss", 3, 7.0)])
    assert [found.value for found in store.metrics(run_id)[2:5]] == [2.0, 7.0, 4.0]
    store.add_metrics(attempt, [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(
    values=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=100),
            st.integers(0, 2**62),
            st.floats(allow_nan=False, allow_infinity=False),
        )
    )
)
def test_every_finite_value_comes_back(
    store: Store, attempt: Attempt, run_id: str, values: list[tuple[str, int, float]]
) -> None:
    store.add_metrics(attempt, [point(*value) for value in values])
    found = {(stored.name, stored.step): stored.value for stored in store.metrics(run_id)}
    assert {(name, step): value for name, step, value in values}.items() <= found.items()


def test_generations_come_in_pages_by_benchmark_and_item(store: Store, attempt: Attempt, run_id: str) -> None:
    given_items = [generation(f"{number:02}") for number in range(5)] + [generation("00", benchmark="cnn_dailymail")]
    store.add_generations(attempt, given_items)
    pages = [store.generations(run_id, limit=2)]
    while pages[-1].next_cursor:
        pages.append(store.generations(run_id, limit=2, cursor=pages[-1].next_cursor))
    assert [len(page.items) for page in pages] == [2, 2, 2]
    assert [item for page in pages for item in page.items] == [given_items[5], *given_items[:5]]
    assert store.generations(run_id, benchmark="xsum", limit=3).items == given_items[:3]
    assert store.generations(run_id, benchmark="arc_easy").items == []
    with pytest.raises(InvalidInputError, match="is not a cursor"):
        store.generations(run_id, cursor=store.runs(store.run(run_id).sweep_id, limit=1).next_cursor)


def test_a_generation_made_again_replaces_the_first(store: Store, attempt: Attempt, run_id: str) -> None:
    store.add_generations(attempt, [generation("1"), generation("2")])
    store.add_generations(attempt, [generation("1", output="another text")])
    assert store.generations(run_id).items == [generation("1", output="another text"), generation("2")]


def test_text_that_a_database_cannot_hold_keeps_its_length(store: Store, attempt: Attempt, run_id: str) -> None:
    store.add_generations(attempt, [generation("1", output="a\0b\0 Ünïcode 漢字 🙂")])
    assert store.generations(run_id).items[0].output == "a\ufffdb\ufffd Ünïcode 漢字 🙂"


def test_scores_keep_why_they_are_missing(store: Store, attempt: Attempt, run_id: str) -> None:
    given_scores = [
        Score(benchmark="xsum", metric="support", value=91.5, items=24, judged_by="a judge"),
        Score(benchmark="xsum", metric="rouge_l", value=None, missing="no references", items=0),
        Score(benchmark="arc_easy", metric="acc_norm", value=0.0, items=10, higher_is_better=False),
    ]
    store.put_scores(attempt, given_scores)
    store.put_scores(attempt, given_scores[:1])
    assert store.scores(run_id) == given_scores[::-1]


def test_artifacts_are_replaced_by_name(store: Store, attempt: Attempt, run_id: str) -> None:
    for path in ("runs/1/old", "runs/1/model"):
        store.add_artifact(attempt, Artifact(run_id=run_id, name="model", path=path))
    store.add_artifact(attempt, Artifact(run_id=run_id, name="log", path="runs/1/log"))
    assert [(artifact.name, artifact.path) for artifact in store.artifacts(run_id)] == [
        ("log", "runs/1/log"),
        ("model", "runs/1/model"),
    ]


def test_a_shared_stage_has_no_run_to_write_results_for(store: Store) -> None:
    sweep = store.create_sweep(example_sweep(distillation={"level": "word+sequence"}))
    attempt = begin(store, stage_ids(store, sweep)[0])
    with pytest.raises(AssertionError, match="belongs to several runs"):
        store.add_metrics(attempt, [point("loss", 1, 1.0)])
