"""A run's EVALUATE stage on a real store: what is stored, what is not done twice, who may write."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contract.errors import ModelNotFoundError, StaleAttemptError
from services.contract.settings import Settings
from services.contract.states import State
from services.evaluation import answering
from services.evaluation import stage as stage_module
from services.evaluation.stage import run_evaluate
from services.store.store import Attempt, Store
from tests.store.examples import begin, example_sweep, finish

EVALUATION = {"benchmarks": ["demo_news"], "limit": 5, "max_new_tokens": 6, "batch_size": 2}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, offline=True)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = Store(settings.resolved_database_url)
    yield store
    store.close()


@pytest.fixture
def run_id(store: Store, settings: Settings, tiny_model: Path) -> str:
    """A run that was trained: the tiny model stands where its student is expected."""
    sweep = store.create_sweep(example_sweep(evaluation=EVALUATION))
    run = store.runs(sweep.id).items[0]
    finish(store, run.stages[0].id)
    shutil.copytree(tiny_model, settings.runs_dir / run.id / "model")
    return run.id


def test_generations_scores_and_progress_are_stored(store: Store, run_id: str, settings: Settings) -> None:
    attempt = _begin(store, run_id)
    run_evaluate(store, attempt, settings)
    store.end_attempt(attempt, State.SUCCEEDED)
    generations = store.generations(run_id).items
    assert [generation.item_id for generation in generations] == [f"demo-news-0{number}" for number in range(1, 6)]
    scores = {score.metric: score for score in store.scores(run_id)}
    mean = sum(generation.scores["rouge_l"] for generation in generations) / 5
    assert scores["rouge_l"].value == pytest.approx(mean)
    assert set(scores) == {"rouge_l", "support", "consistency", "factual_rate"}
    assert store.run(run_id).progress == 1


def test_an_attempt_carries_on_where_the_one_before_stopped(
    store: Store, run_id: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "PAGE", 1)
    plain = answering._generate
    prompts_seen: list[list[int]] = []

    def generate(prompts: list[list[int]], **rest: object) -> list[list[int]]:
        if len(prompts_seen) == 2:
            raise KeyboardInterrupt
        prompts_seen.extend(prompts)
        return plain(prompts, **rest)

    monkeypatch.setattr(answering, "_generate", generate)
    first = _begin(store, run_id)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(store, first, settings)
    stored = store.generations(run_id).items
    assert len(stored) == 2
    assert store.scores(run_id) == []
    store.release_attempt(first)

    prompts_seen.append([])
    run_evaluate(store, _begin(store, run_id), settings)
    assert len(prompts_seen) == 2 + 1 + 3
    assert len(store.generations(run_id).items) == 5
    assert {score.metric: score.items for score in store.scores(run_id)}["rouge_l"] == 5


def test_a_superseded_attempt_stops_and_writes_nothing(store: Store, run_id: str, settings: Settings) -> None:
    first = _begin(store, run_id)
    store.release_attempt(first)
    second = _begin(store, run_id)
    with pytest.raises(StaleAttemptError):
        run_evaluate(store, first, settings)
    assert store.generations(run_id).items == []
    run_evaluate(store, second, settings)
    assert len(store.scores(run_id)) == 4


def test_a_run_without_its_model_is_an_error(store: Store, run_id: str, settings: Settings) -> None:
    shutil.rmtree(settings.runs_dir / run_id / "model")
    with pytest.raises(ModelNotFoundError, match="there is no model directory"):
        run_evaluate(store, _begin(store, run_id), settings)


def _begin(store: Store, run_id: str) -> Attempt:
    return begin(store, store.run(run_id).stages[1].id)
