"""Heads of many architectures: what the loss recomputes is what the model says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.distillation_spec import StudentSpec
from services.contract.errors import UnsupportedError
from services.contract.settings import Settings
from services.models.tiny import make_tiny_model
from student_trainer.data import collate, encode_examples
from student_trainer.loss import distillation_loss
from student_trainer.student import final_hidden_states, load_student, output_head
from tests.teacher.models import ARCHITECTURES, make_model
from tests.trainer.conftest import RECORDS


@pytest.fixture(scope="module")
def model_of(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: make_model(name, tmp_path_factory.mktemp(name), tokenizer_from=tiny_model)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_fused_loss_and_its_gradients_equal_the_model_own(
    name: str, model_of: Callable[[str], Path], settings: Settings
) -> None:
    directory = model_of(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = collate(encode_examples(RECORDS[:4], tokenizer, max_length=256))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    vocab_size = len(tokenizer)

    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits = plain(**inputs).logits[:, :-1, :vocab_size]
    wanted = batch["labels"][:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(logits[wanted], batch["labels"][:, 1:][wanted], reduction="sum")
    expected.backward()

    student = load_student(StudentSpec(model=str(directory)), settings, vocab_size=vocab_size)
    hidden = final_hidden_states(student, head_layer=student.get_output_embeddings(), **inputs)
    sums = distillation_loss(
        hidden.flatten(0, 1)[batch["predictor_N"]],
        token_ids_N=batch["input_ids"].flatten()[batch["predictor_N"] + 1],
        head=output_head(student),
        vocab_size=vocab_size,
    )
    sums.total.backward()
    torch.testing.assert_close(sums.total, expected, rtol=1e-5, atol=1e-5)
    wanted_gradients = dict(plain.named_parameters())
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted_gradients[key].grad, rtol=1e-3, atol=1e-4, msg=key)


def test_the_model_makes_logits_of_one_position_only(student_model: Path, settings: Settings) -> None:
    student = load_student(StudentSpec(model=str(student_model)), settings, vocab_size=300)
    shapes: list[tuple[int, ...]] = []
    head = student.get_output_embeddings()
    head.register_forward_hook(lambda layer, arguments, output: shapes.append(tuple(output.shape[:2])))
    hidden = final_hidden_states(student, head_layer=head, input_ids=torch.ones(3, 20, dtype=torch.int64))
    assert hidden.shape[:2] == (3, 20)
    assert shapes == [(3, 1)]


def test_a_head_with_fewer_rows_than_the_tokenizer_has_ids_is_refused(tmp_path: Path, settings: Settings) -> None:
    directory = make_tiny_model(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="output head only"):
        load_student(StudentSpec(model=str(directory)), settings, vocab_size=10_000)


def test_logits_bent_in_an_unknown_way_are_refused(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def bent(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    directory = make_tiny_model(tmp_path / "model")
    monkeypatch.setattr(LlamaForCausalLM, "forward", bent)
    with pytest.raises(UnsupportedError, match="does something to its logits"):
        load_student(StudentSpec(model=str(directory)), settings, vocab_size=300)
