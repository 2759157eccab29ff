"""What a run leaves on disk while it trains and in the end, and what becomes of damaged or foreign parts of it."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from services.contract.errors import CancelledError, TrainingError
from services.contract.records import MetricPoint, Score
from services.contract.settings import Settings
from services.contract.spec_reading import load_run
from services.models.card import model_card, write_scores
from student_trainer import loss, trainer
from student_trainer.chunk_loss import chunk_loss
from student_trainer.train import train
from tests.trainer.runs import MakeRun, assert_close_weights, assert_same_bits, stop_after


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").iterdir())


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(keep: int, make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    spec = make_run(training={"checkpoint_steps": 1, "keep_checkpoints": keep})
    with pytest.raises(CancelledError, match="stopped at step 5"):
        train(spec, out=tmp_path / "run", settings=settings, should_stop=stop_after(17))
    assert [path.name for path in checkpoints(tmp_path / "run")] == [
        f"checkpoint-{step}" for step in range(6 - keep, 6)
    ]
    more = make_run(training={"checkpoint_steps": 2, "keep_checkpoints": 5})
    train(more, out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "checkpoints").exists(), "nobody needs them beside the model"


@pytest.mark.parametrize("damaged", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_truncated_checkpoint_is_passed_over_aloud(
    damaged: str, make_run: MakeRun, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_run(training={"checkpoint_steps": 1})
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    with pytest.raises(CancelledError):
        train(spec, out=tmp_path / "broken", settings=settings, should_stop=stop_after(12))
    older, newer = checkpoints(tmp_path / "broken")
    whole = (newer / damaged).stat().st_size
    with (newer / damaged).open("r+b") as file:
        file.truncate(whole // 2)
    steps: list[MetricPoint] = []
    resumed = train(spec, out=tmp_path / "broken", settings=settings, on_metrics=steps.extend)
    assert f"{newer} has {whole // 2:,} of {whole:,} bytes of {damaged}; it is removed" in caplog.text
    assert min(point.step for point in steps) == int(older.name.rpartition("-")[2]) + 1
    assert_same_bits(resumed, straight)


def test_checkpoints_that_are_all_damaged_start_the_run_anew(
    make_run: MakeRun, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_run(training={"checkpoint_steps": 1})
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    with pytest.raises(CancelledError):
        train(spec, out=tmp_path / "broken", settings=settings, should_stop=stop_after(12))
    older, newer = checkpoints(tmp_path / "broken")
    (older / "optimizer.pt").unlink()
    (newer / "whole.json").write_text("{")
    assert_same_bits(train(spec, out=tmp_path / "broken", settings=settings), straight)
    assert f"{older} lacks optimizer.pt" in caplog.text
    assert f"{newer} was not saved whole" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    for name, spec in (("one", make_run()), ("other", make_run(seed=4))):
        with pytest.raises(CancelledError):
            train(spec, out=tmp_path / name, settings=settings, should_stop=stop_after(8))
    (strange,) = checkpoints(tmp_path / "other")
    shutil.copytree(strange, tmp_path / "one" / "checkpoints" / "checkpoint-5")
    with pytest.raises(TrainingError, match="checkpoint-5 is a checkpoint of another run"):
        train(make_run(), out=tmp_path / "one", settings=settings)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ..."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_running_out_of_memory_says_what_to_lower(
    error: Exception, make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = trainer.distillation_loss, iter(range(100))

    def scarce(*arguments, **options):
        if next(calls) == 2:
            raise error
        return plain(*arguments, **options)

    monkeypatch.setattr(trainer, "distillation_loss", scarce)
    spec = make_run(training={"micro_batch_size": 2})
    with pytest.raises(TrainingError, match="memory ran out at step 2: ") as caught:
        train(spec, out=tmp_path / "run", settings=settings)
    for advice in ("micro_batch_size (now 2)", "loss_chunk", "precision: bf16", "max_length (now 256)"):
        assert advice in caught.value.fix


def test_a_real_allocation_that_fails_says_what_to_lower(
    make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "distillation_loss", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(TrainingError, match=r"memory ran out at step 1: .*can't allocate memory"):
        train(make_run(), out=tmp_path / "run", settings=settings)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    make_run: MakeRun, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_, **__):
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(trainer, "distillation_loss", wrong)
    with pytest.raises(RuntimeError, match="must match"):
        train(make_run(), out=tmp_path / "run", settings=settings)


def test_chunks_of_the_loss_change_nothing_but_memory(
    make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(make_run(), out=tmp_path / "plain", settings=settings)
    positions = []

    def counted(products_CV: torch.Tensor, *arguments, **options):
        positions.append(len(products_CV))
        return chunk_loss(products_CV, *arguments, **options)

    monkeypatch.setattr(loss, "fastest_chunk_loss", lambda terms, **_: partial(counted, terms=terms))
    chunked = train(make_run(training={"loss_chunk": 3}), out=tmp_path / "chunked", settings=settings)
    assert max(positions) == 3
    assert_close_weights(chunked, plain, start=student_model, share=1e-3)


def test_the_final_model_is_whole_and_tells_how_it_was_made(
    make_run: MakeRun, kd_settings: Settings, tmp_path: Path
) -> None:
    spec = make_run(alpha=0.5, distillation={"temperature": 2.0})
    points: list[MetricPoint] = []
    model = train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    AutoModelForCausalLM.from_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).chat_template
    GenerationConfig.from_pretrained(model)
    card = ModelCard.load(model / "README.md")
    assert card.data.library_name == "transformers"
    assert "knowledge-distillation" in card.data.tags
    last = {point.name: point.value for point in points if point.step == 6}
    for shown in (
        "| method | KD alpha=0.5 |",
        "| temperature | 2 |",
        f"| teacher | {spec.teacher.model} |",
        "| teacher's fingerprint | ",
        f"| data | {spec.dataset.path}, split train: 10 records |",
        "| learning rate | 0.01, constant",
        f"| soft_loss | {last['soft_loss']:.4f} |",
        "Not evaluated yet.",
    ):
        assert shown in card.text
    assert load_run(model / "run.yaml") == spec


@pytest.mark.parametrize(
    ("distillation", "weighed", "labels"),
    [
        ({}, "cross-entropy", "exact"),
        ({"labels": {"encoding": "top_k", "k": 8}}, "cross-entropy", "top_k, k 8"),
        (
            {"labels": {"encoding": "sampled", "draws": 50, "seed": 7}},
            "cross-entropy",
            "sampled, 50 draws, seed 7",
        ),
        ({"divergence": "reverse_kl"}, "reverse Kullback-Leibler divergence", "exact"),
        ({"divergence": "jsd"}, "generalised Jensen-Shannon divergence (beta 0.5)", "exact"),
        ({"divergence": "jsd", "beta": 0.3}, "generalised Jensen-Shannon divergence (beta 0.3)", "exact"),
        (
            {"cross_tokenizer": "uld"},
            "distance of sorted probabilities (universal logit distillation)",
            "exact",
        ),
    ],
)
@pytest.mark.parametrize("level", ["word", "word+sequence"])
def test_the_card_says_what_alpha_weighed(
    level: str, distillation: dict, weighed: str, labels: str, make_run: MakeRun
) -> None:
    spec = make_run(alpha=0.5, distillation=distillation | {"level": level})
    card = model_card(spec, teacher_fingerprint="f", examples=10, steps=6, losses={})
    assert f"plus alpha times the {weighed} against " in card
    assert f"| divergence | {weighed} |" in card
    assert f"| soft labels | {labels} |" in card


def test_the_card_says_what_each_teacher_counted(make_run: MakeRun) -> None:
    spec = make_run(alpha=0.5, teacher={"model": "a", "weight": 3, "others": [{"model": "b"}]})
    card = model_card(spec, teacher_fingerprint="f, g", examples=10, steps=6, losses={})
    assert "| teacher | a, weight 0.75 |\n| another teacher | b, weight 0.25 |" in card


def test_the_specification_beside_a_model_repeats_it(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    model = train(make_run(), out=tmp_path / "run", settings=settings)
    again = train(load_run(model / "run.yaml"), out=tmp_path / "again", settings=settings)
    assert_same_bits(again, model)


def test_scores_enter_the_card_and_replace_earlier_ones(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    model = train(make_run(), out=tmp_path / "run", settings=settings)
    made = ModelCard.load(model / "README.md").text.partition("## Scores")[0]
    for value in (20.0, 21.5):
        scores = [
            Score(benchmark="xsum", metric="rouge_l", value=value, items=7),
            Score(benchmark="xsum", metric="factual_rate", value=None, missing="no lens", items=0),
        ]
        write_scores(model, scores)
    card = ModelCard.load(model / "README.md")
    assert card.text.partition("## Scores")[0] == made
    assert [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("xsum", "rouge_l", 21.5)
    ]
    assert "| xsum | ROUGE-L | 21.50 | 7 |" in card.text
    assert "| xsum | Factual rate | not measured: no lens | 0 |" in card.text
    assert "20.00" not in card.text
    # A model that came from elsewhere keeps its own card.
    (model / "README.md").write_text("# Mine\n")
    write_scores(model, [])
    assert (model / "README.md").read_text() == "# Mine\n"
