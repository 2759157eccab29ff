"""The student as it is loaded: what it refuses, and what its forward pass spares."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.contract.distillation_spec import StudentSpec
from services.contract.errors import ModelNotFoundError, UnsupportedError
from services.contract.settings import Settings
from services.models.tiny import make_tiny_model
from student_trainer.student import final_hidden_states, load_student


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


def test_weights_that_are_cut_short_are_named(tmp_path: Path, settings: Settings) -> None:
    weights = make_tiny_model(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelNotFoundError, match=f"{tmp_path / 'model'} cannot be loaded as a student"):
        load_student(StudentSpec(model=str(tmp_path / "model")), settings, vocab_size=100)


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path, settings: Settings) -> None:
    file = make_tiny_model(tmp_path / "model") / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"its weights lack model\.layers\.0\.mlp\.down_proj\.weight"):
        load_student(StudentSpec(model=str(tmp_path / "model")), settings, vocab_size=100)


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
