"""Several records in one row: where they stand, and that nothing else changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from services.contract.distillation_spec import StudentSpec
from services.contract.errors import UnsupportedError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from student_trainer.data import NOT_LEARNT, Example, collate, encode_examples
from student_trainer.loss import distillation_loss
from student_trainer.packing import pack, require_packable
from student_trainer.student import final_hidden_states, load_student, output_head
from student_trainer.train import train
from tests.teacher.models import ARCHITECTURES
from tests.trainer.conftest import RECORDS
from tests.trainer.runs import MakeRun, assert_close_weights


def test_records_stand_side_by_side_and_are_predicted_in_their_own_order() -> None:
    examples = [
        Example(index=4, token_ids=[1, 2, 3], prompt_length=1),
        Example(index=9, token_ids=[11, 12, 13, 14, 15, 16], prompt_length=4),
        Example(index=2, token_ids=[21, 22, 23, 24], prompt_length=2),
    ]
    batch = pack(examples, max_length=8)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14, 15, 16, 0], [21, 22, 23, 24, 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]
    none = NOT_LEARNT
    assert batch["labels"].tolist() == [[none] * 4 + [15, 16, none], [none, none, 23, 24, none, 2, 3]]
    assert batch["input_ids"].flatten()[batch["predictor_N"] + 1].tolist() == [2, 3, 15, 16, 23, 24]
    assert batch["input_ids"].flatten()[batch["predictor_N"]].tolist() == [1, 2, 14, 15, 22, 23]
    assert batch["record_B"].tolist() == [4, 9, 2]


def test_rows_are_as_few_as_first_fit_finds_and_never_too_long() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (40,), generator=generator).tolist()
    examples = [Example(index=place, token_ids=[1] * length, prompt_length=1) for place, length in enumerate(lengths)]
    batch = pack(examples, max_length=64)
    rows, width = batch["input_ids"].shape
    assert width <= 64
    assert batch["attention_mask"].sum() == sum(lengths)
    # First-fit, longest first, never needs more than 11/9 of the fewest rows, and those hold at least this much.
    assert rows <= 11 / 9 * -(-sum(lengths) // 64) + 1
    assert rows < 40


REFUSED = {"bloom-normed-embeddings": "BloomForCausalLM", "opt-projected": "OPTForCausalLM"}
"""Bloom takes no positions, its attention is biased by distance; OPT's attention is not told of them."""


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(REFUSED)))
def test_loss_and_gradients_are_those_of_records_alone(
    name: str, family: Callable[[str], Path], settings: Settings
) -> None:
    directory = family(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    examples = encode_examples(RECORDS, tokenizer, max_length=256)
    student = load_student(StudentSpec(model=str(directory)), settings, vocab_size=len(tokenizer))
    require_packable(student, vocab_size=len(tokenizer))
    student.double()

    def run(batch: dict[str, torch.Tensor], *taken: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        inputs = {key: batch[key] for key in taken}
        hidden = final_hidden_states(student, head_layer=student.get_output_embeddings(), **inputs)
        sums = distillation_loss(
            hidden.flatten(0, 1)[batch["predictor_N"]],
            token_ids_N=batch["input_ids"].flatten()[batch["predictor_N"] + 1],
            head=output_head(student),
            vocab_size=len(tokenizer),
        )
        return sums.total, list(torch.autograd.grad(sums.total, list(student.parameters())))

    packed = pack(examples, max_length=200)
    assert len(packed["input_ids"]) < len(examples) / 2
    found, gradients = run(packed, "input_ids", "position_ids")
    expected, wanted = run(collate(examples), "input_ids", "attention_mask")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert (gradient - other).norm() <= 1e-5 * other.norm() + 1e-9


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_keep_records_apart_is_refused(
    name: str, family: Callable[[str], Path], make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    student = {"model": str(family(name))}
    with pytest.raises(UnsupportedError, match=f"{REFUSED[name]} does not keep records apart") as caught:
        train(make_run(student=student, training={"packing": True}), out=tmp_path / "run", settings=settings)
    assert "training.packing" in caught.value.fix
    assert not (tmp_path / "run").exists()
    assert train(make_run(student=student), out=tmp_path / "run", settings=settings).is_dir()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_packed_run_trains_the_same_student(
    alpha: float,
    micro_batch_size: int | None,
    make_run: MakeRun,
    kd_settings: Settings,
    student_model: Path,
    tmp_path: Path,
) -> None:
    """Batches still count records, and labels reach the tokens that they belong to."""
    models, curves = [], []
    for packing in (False, True):
        points: list[MetricPoint] = []
        spec = make_run(alpha=alpha, training={"packing": packing, "micro_batch_size": micro_batch_size})
        models.append(train(spec, out=tmp_path / str(packing), settings=kd_settings, on_metrics=points.extend))
        curves.append([(point.step, point.value) for point in points if point.name == "loss"])
    assert_close_weights(*models, start=student_model, share=1e-3)
    assert [step for step, _ in curves[1]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in curves[1]] == pytest.approx([value for _, value in curves[0]], rel=1e-4)
