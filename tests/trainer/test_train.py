"""Whole runs of a tiny student, against a plain training loop, a real teacher, interruptions and bad input."""

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import (
    CancelledError,
    DatasetError,
    HandshakeError,
    ModelNotFoundError,
    TeacherUnavailableError,
    TrainingError,
    UnsupportedError,
)
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec import RunSpec, load_run
from services.datasets.reading import load_records
from services.models.tiny import make_tiny_model
from student_trainer import teacher
from student_trainer.data import collate, encode_examples
from student_trainer.teacher_client import TeacherClient
from student_trainer.train import train

MakeRun = Callable[..., RunSpec]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def assert_same_bits(left: Path, right: Path) -> None:
    expected = weights(right)
    for name, tensor in weights(left).items():
        assert torch.equal(tensor, expected[name]), name


def assert_close_weights(left: Path, right: Path, *, start: Path, share: float) -> None:
    """Apart by at most ``share`` of the way that training went."""
    first, second, before = weights(left), weights(right), weights(start)
    apart = math.sqrt(sum((first[name] - second[name]).square().sum().item() for name in before))
    way = math.sqrt(sum((first[name] - before[name]).square().sum().item() for name in before))
    assert apart <= share * way, f"{apart} of {way}"


def mean_divergence(teacher_model: Path, student: Path, records_file: Path) -> float:
    """Mean KL(teacher || student) over response tokens, from transformers' own logits in float64."""
    from services.contract.spec import DatasetSpec

    tokenizer = AutoTokenizer.from_pretrained(student)
    batch = collate(encode_examples(load_records(DatasetSpec(path=str(records_file))), tokenizer, max_length=256))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logprobs = []
    for directory in (teacher_model, student):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        with torch.no_grad():
            logits = model(**inputs).logits.flatten(0, 1)[batch["predictor_N"], : len(tokenizer)]
        logprobs.append(logits.log_softmax(dim=1))
    p, q = logprobs
    return (p.exp() * (p - q)).sum(dim=1).mean().item()


def plain_sft(spec: RunSpec, model_directory: Path) -> dict[str, torch.Tensor]:
    """Supervised fine-tuning as anybody would write it: AdamW on transformers' own token mean, a seeded order."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    examples = encode_examples(load_records(spec.dataset), tokenizer, max_length=spec.training.max_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=0.0)
    for epoch in range(spec.training.epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(spec.seed + epoch)).tolist()
        for start in range(0, len(order), spec.batch_size):
            batch = collate([examples[index] for index in order[start : start + spec.batch_size]])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1, : len(tokenizer)].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_sft_equals_a_plain_training_loop(
    make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    spec = make_run(training={"warmup_ratio": 0.0, "epochs": 2})
    trained = weights(train(spec, out=tmp_path / "run", settings=settings))
    expected = plain_sft(spec, student_model)
    before = weights(student_model)
    for name, tensor in trained.items():
        assert (expected[name] - tensor).norm() <= 1e-3 * (expected[name] - before[name]).norm() + 1e-6, name


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_micro_batch_changes_nothing(
    alpha: float, make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    models = [
        train(
            make_run(alpha=alpha, training={"micro_batch_size": size}),
            out=tmp_path / str(size),
            settings=kd_settings,
        )
        for size in (1, 2, 4)
    ]
    for other in models[1:]:
        assert_close_weights(models[0], other, start=student_model, share=1e-3)


def test_distillation_brings_the_student_to_the_teacher(
    make_run: MakeRun,
    kd_settings: Settings,
    student_model: Path,
    teacher_model: Path,
    records_file: Path,
    tmp_path: Path,
) -> None:
    points: list[MetricPoint] = []
    spec = make_run(alpha=10.0, training={"epochs": 12})
    model = train(spec, out=tmp_path / "kd", settings=kd_settings, on_metrics=points.extend)
    before = mean_divergence(teacher_model, student_model, records_file)
    after = mean_divergence(teacher_model, model, records_file)
    sft = train(make_run(training={"epochs": 12}), out=tmp_path / "sft", settings=kd_settings)
    assert after < 0.5 * before
    assert after < 0.5 * mean_divergence(teacher_model, sft, records_file)

    curves = {name: [p.value for p in points if p.name == name] for name in {p.name for p in points}}
    assert set(curves) == {
        "loss",
        "hard_loss",
        "soft_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "label_wait_seconds",
        "epoch",
    }
    assert [p.step for p in points if p.name == "loss"] == list(range(1, 37))
    for loss, hard, soft in zip(curves["loss"], curves["hard_loss"], curves["soft_loss"], strict=True):
        assert loss == pytest.approx(hard + 10.0 * soft)
    assert curves["soft_loss"][-1] < curves["soft_loss"][0]
    assert curves["epoch"][-1] == pytest.approx(12)


def test_the_first_step_logs_the_loss_of_the_untrained_student(
    make_run: MakeRun,
    kd_settings: Settings,
    student_model: Path,
    teacher_model: Path,
    records_file: Path,
    tmp_path: Path,
) -> None:
    """One batch of all records: soft loss minus the teacher's entropy is the divergence that transformers gives."""
    points: list[MetricPoint] = []
    spec = make_run(alpha=1.0, batch_size=10, training={"epochs": 1})
    train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    tokenizer = AutoTokenizer.from_pretrained(teacher_model)
    batch = collate(encode_examples(load_records(spec.dataset), tokenizer, max_length=256))
    model = AutoModelForCausalLM.from_pretrained(teacher_model, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    p = logits.flatten(0, 1)[batch["predictor_N"], : len(tokenizer)].log_softmax(dim=1)
    entropy = -(p.exp() * p).sum(dim=1).mean().item()
    soft = next(point.value for point in points if point.name == "soft_loss")
    divergence = mean_divergence(teacher_model, student_model, records_file)
    assert soft - entropy == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "share"),
    [({"encoding": "full"}, 0.05), ({"encoding": "top_k", "k": 1024}, 0.05)],
)
def test_every_encoding_of_whole_distributions_trains_the_same_student(
    labels: dict, share: float, make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    exact = make_run(alpha=1.0)
    other = make_run(alpha=1.0, distillation={"labels": labels})
    assert_close_weights(
        train(exact, out=tmp_path / "exact", settings=kd_settings),
        train(other, out=tmp_path / "other", settings=kd_settings),
        start=student_model,
        share=share,
    )


def test_the_result_is_a_whole_model(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    spec = make_run(training={"checkpoint_steps": 1})
    model = train(spec, out=tmp_path / "run", settings=settings)
    assert model == tmp_path / "run" / "model"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model", "run.yaml"]
    assert load_run(tmp_path / "run" / "run.yaml") == spec
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.chat_template
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    # A run that has ended is not trained again.
    stamp = (model / "model.safetensors").stat().st_mtime_ns
    assert train(spec, out=tmp_path / "run", settings=settings) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.fixture
def dropout_model(student_model: Path, tmp_path: Path) -> Path:
    """Draws random numbers in every layer of every forward pass."""
    directory = tmp_path / "dropout"
    shutil.copytree(student_model, directory)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.2'))
    assert '"attention_dropout": 0.2' in config.read_text()
    return directory


def stop_after(asked: int) -> Callable[[], bool]:
    """Says stop once it was asked so often; it is asked after every record."""
    left = iter(range(asked))
    return lambda: next(left, None) is None


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("stops", [(2,), (3,), (5, 2), (9,), (10,), (12, 4)])
def test_an_interrupted_run_ends_with_the_same_bits(
    alpha: float,
    stops: tuple[int, ...],
    make_run: MakeRun,
    settings: Settings,
    mock_address: str,
    student_model: Path,
    dropout_model: Path,
    tmp_path: Path,
) -> None:
    """Stopped within the first step, between steps, within others, at an epoch's end, right behind it, and twice.

    The mock teacher's labels are the same bits whatever else it is asked at the time.
    """
    settings = settings.model_copy(update={"teacher_address": mock_address})
    spec = make_run(
        alpha=alpha,
        student={"model": str(dropout_model)},
        teacher={"model": str(student_model)},
        training={"lr_scheduler": "cosine"},
    )
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    for stop in stops:
        with pytest.raises(CancelledError, match="stopped at step"):
            train(spec, out=tmp_path / "broken", settings=settings, should_stop=stop_after(stop))
        assert not (tmp_path / "broken" / "model").exists()
    steps: list[MetricPoint] = []
    resumed = train(spec, out=tmp_path / "broken", settings=settings, on_metrics=steps.extend)
    assert_same_bits(resumed, straight)
    if stops[0] >= 3:
        assert min(point.step for point in steps) > 1, "it started anew instead of going on"


def test_a_checkpoint_cut_short_is_left_aside(
    make_run: MakeRun, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_run(training={"checkpoint_steps": 1})
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    with pytest.raises(CancelledError):
        train(spec, out=tmp_path / "broken", settings=settings, should_stop=stop_after(12))
    checkpoints = sorted((tmp_path / "broken" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    (checkpoints[-1] / "whole.json").unlink()
    (checkpoints[-1] / "model.safetensors").write_bytes(b"cut short")
    resumed = train(spec, out=tmp_path / "broken", settings=settings)
    assert f"{checkpoints[-1]} was not saved whole" in caplog.text
    assert_same_bits(resumed, straight)


def test_sigterm_saves_a_checkpoint(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    spec = make_run()
    before = signal.getsignal(signal.SIGTERM)

    def terminate(points: list[MetricPoint]) -> None:
        if points[0].step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(CancelledError, match="stopped at step"):
        train(spec, out=tmp_path / "run", settings=settings, on_metrics=terminate)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / "whole.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("labels")]


def test_without_alpha_no_teacher_is_contacted(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    """Nothing listens at the settings' teacher address."""
    assert train(make_run(), out=tmp_path / "run", settings=settings).is_dir()


def test_an_unreachable_teacher_is_an_error_before_training(
    make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        teacher, "TeacherClient", lambda address, **options: TeacherClient(address, patience_seconds=0.3, **options)
    )
    with pytest.raises(TeacherUnavailableError, match=r"127\.0\.0\.1:9"):
        train(make_run(alpha=1.0), out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_before_training(make_run: MakeRun, kd_settings: Settings, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", vocab_size=290)
    with pytest.raises(HandshakeError, match="token ids"):
        train(make_run(alpha=1.0, student={"model": str(other)}), out=tmp_path / "run", settings=kd_settings)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_refused(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        train(make_run(student={"model": str(tmp_path / "no")}), out=tmp_path / "run", settings=settings)


def test_a_bad_row_is_refused_before_training(
    make_run: MakeRun, settings: Settings, records_file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(records_file.read_text() + '{"instruction": "Name a port.", "response": ""}\n')
    with pytest.raises(DatasetError, match="line 11: column 'response' is empty"):
        train(make_run(dataset={"path": str(bad)}), out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_fp16_without_a_gpu_is_refused(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(UnsupportedError, match="needs a GPU"):
        train(make_run(training={"precision": "fp16"}), out=tmp_path / "run", settings=settings)


def test_bfloat16_trains_to_nearly_the_same_student(
    make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    models = [
        train(make_run(alpha=1.0, training={"precision": precision}), out=tmp_path / precision, settings=kd_settings)
        for precision in ("fp32", "bf16")
    ]
    assert {tensor.dtype for tensor in weights(models[1]).values()} == {torch.bfloat16}
    assert_close_weights(models[0], models[1], start=student_model, share=0.3)


def test_a_loss_that_is_not_finite_names_step_and_records(
    make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    spec = make_run(learning_rate=1e30, batch_size=5, training={"checkpoint_steps": 1, "epochs": 3})
    with pytest.raises(TrainingError, match=r"the loss is not finite at step [23], records \["):
        train(spec, out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "model").exists()


def test_a_gradient_that_is_not_finite_is_an_error(
    make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    """Weights near the end of float32's range: the loss can still be told, its gradient cannot."""
    directory = tmp_path / "model"
    shutil.copytree(student_model, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e-30
    tensors["lm_head.weight"] *= 1e30
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="is not finite at step 1"):
        train(make_run(student={"model": str(directory)}), out=tmp_path / "run", settings=settings)


def test_another_run_directory_is_refused_and_what_is_evaluated_may_change(
    make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(CancelledError):
        train(make_run(), out=tmp_path / "run", settings=settings, should_stop=stop_after(8))
    with pytest.raises(TrainingError, match="holds another run"):
        train(make_run(seed=4), out=tmp_path / "run", settings=settings)
    evaluated = make_run(evaluation={"benchmarks": ["demo_news"]})
    assert train(evaluated, out=tmp_path / "run", settings=settings).is_dir()


def test_a_refused_model_is_not_published(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    def refuse() -> None:
        raise TrainingError("somebody else has the run")

    with pytest.raises(TrainingError, match="somebody else"):
        train(make_run(), out=tmp_path / "run", settings=settings, before_rename=refuse)
    assert not (tmp_path / "run" / "model").exists()
    assert train(make_run(), out=tmp_path / "run", settings=settings).is_dir()
