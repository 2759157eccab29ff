"""The teacher fine-tuned first: what it becomes, that it is made once, and that students learn from it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from services.contract.errors import CancelledError, SpecError, TeacherError
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from student_trainer.decode import decode_responses
from student_trainer.finetune import finetune_teacher
from student_trainer.student import load_tokenizer
from student_trainer.teacher import open_client
from student_trainer.train import train
from teacher_server import models
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher
from tests.trainer.runs import assert_same_bits, weights

FULL = {"method": "full", "epochs": 2, "learning_rate": 1e-2, "batch_size": 5}
LORA = {"method": "lora", "epochs": 2, "learning_rate": 1e-1, "batch_size": 5}


@pytest.fixture
def served(settings: Settings, teacher_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """A teacher that was started with its model as it is, and shares the data directory."""
    monkeypatch.setattr(models, "IDLE_SECONDS", 0)
    options = TeacherOptions(model=str(teacher_model), engine="transformers", port=0, label_dtype="float32")
    with running_teacher(options, settings=settings) as address:
        yield settings.model_copy(update={"teacher_address": address})


@pytest.fixture
def make_kd(make_run: Callable[..., RunSpec], teacher_model: Path) -> Callable[..., RunSpec]:
    def make(finetune: dict | None, *, alpha: float = 1.0, **changes: object) -> RunSpec:
        return make_run(alpha=alpha, teacher={"model": str(teacher_model), "finetune": finetune}, **changes)

    return make


def test_full_fine_tuning_is_plain_supervised_training_of_the_teacher(
    make_kd: Callable[..., RunSpec],
    make_run: Callable[..., RunSpec],
    teacher_model: Path,
    settings: Settings,
    tmp_path: Path,
) -> None:
    spec = make_kd(FULL)
    model = finetune_teacher(spec, settings=settings)
    assert model == settings.data_dir / "teachers" / spec.finetune_key / "model"
    plain = make_run(student={"model": str(teacher_model)}, batch_size=5, learning_rate=1e-2, seed=0)
    expected = train(plain, out=tmp_path / "plain", settings=settings)
    assert_same_bits(model, expected)


def test_an_adapter_is_merged_into_a_whole_checkpoint(
    make_kd: Callable[..., RunSpec], teacher_model: Path, settings: Settings
) -> None:
    model = finetune_teacher(make_kd(LORA), settings=settings)
    after, before = weights(model), weights(teacher_model)
    assert after.keys() == before.keys()
    changes = {name: (after[name] - before[name]).float() for name in before}
    for name, change in changes.items():
        if name.endswith("_proj.weight"):
            assert change.abs().max() > 0, name
            assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 16
        else:
            assert change.abs().max() == 0, name


@pytest.mark.parametrize("finetune", [FULL, LORA], ids=["full", "lora"])
def test_students_learn_from_the_fine_tuned_teacher(
    make_kd: Callable[..., RunSpec],
    make_run: Callable[..., RunSpec],
    finetune: dict,
    served: Settings,
    tmp_path: Path,
) -> None:
    """The same student comes of a teacher that was started with the fine-tuned model; another of the one before."""
    spec = make_kd(finetune)
    model = finetune_teacher(spec, settings=served)
    student = train(spec, out=tmp_path / "student", settings=served)
    before = train(make_kd(None), out=tmp_path / "before", settings=served)

    options = TeacherOptions(model=str(model), engine="transformers", port=0, label_dtype="float32")
    with running_teacher(options, settings=served) as address:
        direct = make_run(alpha=1.0, teacher={"model": str(model)})
        settings = served.model_copy(update={"teacher_address": address})
        assert_same_bits(student, train(direct, out=tmp_path / "direct", settings=settings))
    assert any(not torch.equal(weights(student)[name], tensor) for name, tensor in weights(before).items())


def test_labels_are_those_of_the_fine_tuned_weights(make_kd: Callable[..., RunSpec], served: Settings) -> None:
    spec = make_kd(FULL)
    model = AutoModelForCausalLM.from_pretrained(finetune_teacher(spec, settings=served))
    sequence = TokenSequence(id="x", token_ids=[3, 1, 4, 1, 5, 9, 2, 6], label_positions=[2, 3, 7])
    with torch.no_grad():
        logits = model(torch.tensor([sequence.token_ids])).logits[0, [1, 2, 6]]
    client = open_client(spec, tokenizer=load_tokenizer(spec.student, served), settings=served)
    with client:
        (scored,) = client.score([sequence], LabelOptions())
        found = torch.from_numpy(client.fetch_lm_head().logits(scored.labels.hidden_ND))
    expected = logits[:, : found.shape[1]].log_softmax(-1)
    torch.testing.assert_close(found.log_softmax(-1), expected, atol=1e-4, rtol=1e-4)


def test_decodes_are_those_of_the_fine_tuned_weights(
    make_kd: Callable[..., RunSpec], served: Settings, records_file: Path
) -> None:
    """Fine-tuned until it answers all prompts alike, and ends its answers, which its random start never does."""
    answer = "14 ferries had been repaired."
    records = [json.loads(line) | {"response": answer} for line in records_file.read_text().splitlines()]
    data = served.data_dir.parent / "one-answer.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = make_kd(
        FULL | {"epochs": 20},
        dataset={"path": str(data)},
        distillation={"level": "word+sequence"},
        training={"max_length": 256, "epochs": 1},
    )
    finetune_teacher(spec, settings=served)
    decoded = decode_responses(spec, tokenizer=load_tokenizer(spec.student, served), settings=served)
    responses = [json.loads(line)["response"] for line in decoded.read_text().splitlines()]
    assert responses == [answer] * len(records)


def test_it_is_made_once_and_others_wait(
    make_kd: Callable[..., RunSpec], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from student_trainer import finetune

    trained = []
    plain = finetune.train
    monkeypatch.setattr(finetune, "train", lambda *spec, **how: trained.append(1) or plain(*spec, **how))
    spec, other = make_kd(FULL), make_kd(FULL, alpha=0.1, seed=9, learning_rate=1e-4)
    assert spec.finetune_key == other.finetune_key
    directory = settings.data_dir / "teachers" / spec.finetune_key
    directory.parent.mkdir(parents=True)
    with FileLock(directory.with_suffix(".lock")), pytest.raises(CancelledError, match="another process"):
        finetune_teacher(spec, settings=settings, should_stop=lambda: True)
    assert not trained
    model = finetune_teacher(spec, settings=settings)
    written = (model / "model.safetensors").stat().st_mtime_ns
    assert finetune_teacher(other, settings=settings) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == written


def test_an_interrupted_one_goes_on(make_kd: Callable[..., RunSpec], settings: Settings, tmp_path: Path) -> None:
    spec = make_kd(FULL, training={"checkpoint_steps": 1})
    straight = finetune_teacher(spec, settings=settings)
    left = iter(range(6))
    elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})
    with pytest.raises(CancelledError):
        finetune_teacher(spec, settings=elsewhere, should_stop=lambda: next(left, None) is None)
    assert_same_bits(finetune_teacher(spec, settings=elsewhere), straight)


def test_a_student_does_not_begin_before_its_teacher_is_made(
    make_kd: Callable[..., RunSpec], served: Settings, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match="has not been fine-tuned"):
        train(make_kd(FULL), out=tmp_path / "student", settings=served)


def test_what_needs_no_fine_tuning_has_none(make_run: Callable[..., RunSpec], make_kd: Callable[..., RunSpec]) -> None:
    assert make_run().finetune_run is None
    assert make_kd(None).finetune_run is None
    in_files = make_kd(FULL, distillation={"labels": {"path": "labels"}})
    assert in_files.finetune_run is None
    assert make_kd(FULL).finetune_key != make_kd(LORA).finetune_key
    assert make_kd(FULL).finetune_key != make_kd(FULL | {"epochs": 3}).finetune_key
    decoded = [make_kd(how, distillation={"level": "word+sequence"}).decode_key for how in (None, FULL, LORA)]
    assert len(set(decoded)) == 3


def test_mistakes_are_named(make_kd: Callable[..., RunSpec]) -> None:
    with pytest.raises(SpecError, match="lora only goes with method lora"):
        make_kd(FULL | {"lora": {"rank": 4}})
    with pytest.raises(SpecError, match="micro_batch_size 4 does not divide batch_size 5"):
        make_kd(FULL, training={"micro_batch_size": 4}, batch_size=4)
