"""DECODE and TRAIN stages against a real store and real teachers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import DatasetError, StaleAttemptError
from services.contract.prompt import encode_prompt
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from services.contract.spec_reading import load_run, parse_sweep
from services.contract.states import StageKind, State
from services.models.tiny import make_tiny_model
from services.store.store import Attempt, Store
from student_trainer.decode import decode_responses
from student_trainer.stage import run_decode, run_train
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher
from tests.trainer.conftest import RECORDS


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    settings.data_dir.mkdir(parents=True)
    store = Store(settings.resolved_database_url)
    yield store
    store.close()


def begin(store: Store, spec: RunSpec, kind: StageKind) -> Attempt:
    """A sweep of this one run, its first stage of the kind begun, the stages it needs done."""
    sweep = store.create_sweep(
        parse_sweep(
            {
                "name": "test",
                "student": spec.student.model_dump(),
                "teacher": spec.teacher.model_dump() if spec.teacher else None,
                "dataset": spec.dataset.model_dump(),
                "distillation": spec.distillation.model_dump(),
                "grid": {
                    "alpha": spec.alpha,
                    "learning_rate": spec.learning_rate,
                    "batch_size": spec.batch_size,
                    "seed": spec.seed,
                },
                "training": spec.training.model_dump(),
            }
        )
    )
    assert store.runs(sweep.id).items[0].spec == spec
    while True:
        (stage,) = store.ready_stages()
        attempt = store.begin_attempt(stage.id, worker="test", lease_seconds=60)
        assert attempt is not None
        if stage.kind == kind:
            return attempt
        store.end_attempt(attempt, State.SUCCEEDED)


def test_a_train_stage_leaves_metrics_progress_and_artifacts(
    make_run: Callable[..., RunSpec], kd_settings: Settings, store: Store
) -> None:
    spec = make_run(alpha=0.5)
    attempt = begin(store, spec, StageKind.TRAIN)
    run_train(store, attempt, kd_settings)
    run_id = store.stage(attempt.stage_id).run_id
    points = store.metrics(run_id)
    for name in ("loss", "hard_loss", "soft_loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"):
        assert [point.step for point in points if point.name == name] == [1, 2, 3, 4, 5, 6]
    artifacts = {artifact.name: kd_settings.data_dir / artifact.path for artifact in store.artifacts(run_id)}
    assert load_run(artifacts["run.yaml"]) == spec
    assert artifacts["model"] == kd_settings.runs_dir / run_id / "model"
    AutoModelForCausalLM.from_pretrained(artifacts["model"])


def test_a_superseded_attempt_publishes_nothing(
    make_run: Callable[..., RunSpec], settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = begin(store, make_run(), StageKind.TRAIN)
    run_id = store.stage(attempt.stage_id).run_id
    # The lease runs out just before the rename, and another worker takes the stage.
    plain = store.check_current

    def check(attempt: Attempt) -> None:
        store.release_attempt(attempt)
        store.begin_attempt(attempt.stage_id, worker="other", lease_seconds=60)
        plain(attempt)

    monkeypatch.setattr(store, "check_current", check)
    with pytest.raises(StaleAttemptError):
        run_train(store, attempt, settings)
    assert not (settings.runs_dir / run_id / "model").exists()
    assert store.artifacts(run_id) == []


def greedy(model_directory: Path, prompt: list[int], *, most: int) -> list[int]:
    """Plain greedy decoding, one forward pass a token, in the tokenizer's ids alone."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    ids: list[int] = []
    while len(ids) < most and (not ids or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1, : len(tokenizer)]
        ids.append(int(logits.argmax()))
    return ids


@pytest.fixture(scope="module")
def talkative_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ends some answers in time, and some not."""
    directory = make_tiny_model(tmp_path_factory.mktemp("talkative"), seed=11)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[tokenizer.eos_token_id].mul_(1.35)
    model.save_pretrained(directory)
    return directory


def test_decodes_are_the_teacher_greedy_answers_and_students_learn_them(
    make_run: Callable[..., RunSpec],
    settings: Settings,
    store: Store,
    talkative_teacher: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = make_run(
        teacher={"model": str(talkative_teacher)},
        distillation={"level": "sequence"},
        training={"max_length": 110, "epochs": 1},
    )
    attempt = begin(store, spec, StageKind.DECODE)
    options = TeacherOptions(model=str(talkative_teacher), engine="transformers", port=0)
    with running_teacher(options) as address:
        run_decode(store, attempt, settings.model_copy(update={"teacher_address": address}))

    tokenizer = AutoTokenizer.from_pretrained(talkative_teacher)
    expected = []
    for record in RECORDS:
        prompt = encode_prompt(tokenizer, instruction=record["instruction"], context=record["context"])
        ids = greedy(talkative_teacher, prompt, most=110 - len(prompt))
        text = tokenizer.decode(ids[:-1], skip_special_tokens=True).strip()
        if ids[-1] == tokenizer.eos_token_id and text:
            expected.append({**record, "response": text})
    assert 0 < len(expected) < len(RECORDS), "the test needs answers of both kinds"
    path = settings.data_dir / "decodes" / f"{spec.decode_key}.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == expected
    assert f"left out {len(RECORDS) - len(expected)} of {len(RECORDS)} records" in caplog.text

    # No teacher serves any more: the decodes are there.
    store.end_attempt(attempt, State.SUCCEEDED)
    (stage,) = store.ready_stages()
    attempt = store.begin_attempt(stage.id, worker="test", lease_seconds=60)
    run_train(store, attempt, settings)
    assert (settings.runs_dir / stage.run_id / "model").is_dir()


def test_a_teacher_that_ends_no_answer_is_an_error(
    make_run: Callable[..., RunSpec], kd_settings: Settings, teacher_model: Path
) -> None:
    spec = make_run(
        teacher={"model": str(teacher_model)}, distillation={"level": "sequence"}, training={"max_length": 70}
    )
    tokenizer = AutoTokenizer.from_pretrained(teacher_model)
    with pytest.raises(DatasetError, match="ended none of its 10 responses"):
        decode_responses(spec, tokenizer=tokenizer, settings=kd_settings)
    assert not (kd_settings.data_dir / "decodes").exists()


def test_supervised_fine_tuning_has_no_soft_loss(
    make_run: Callable[..., RunSpec], settings: Settings, store: Store
) -> None:
    """An absent term is absent, not 0."""
    attempt = begin(store, make_run(alpha=0.0), StageKind.TRAIN)
    run_train(store, attempt, settings)
    names = {point.name for point in store.metrics(store.stage(attempt.stage_id).run_id)}
    assert "hard_loss" in names
    assert names.isdisjoint({"soft_loss", "label_wait_seconds"})
