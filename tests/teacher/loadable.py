"""Weights that a running teacher can be told to serve, and what it must answer then."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from services.contract.sequences import DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.settings import Settings
from student_trainer.teacher_client import TeacherClient
from teacher_server import models
from teacher_server.options import TeacherOptions
from tests.teacher.models import make_model
from tests.teacher.serving import running_teacher

SEQUENCES = [
    TokenSequence(id=str(n), token_ids=[(31 * n + 7 * p) % 290 for p in range(8 + n)], label_positions=[2, 5, 7 + n])
    for n in range(6)
]


@dataclass(frozen=True)
class Folder:
    """A server's data directory with weights to load, and weights outside it."""

    data: Path
    base: Path
    tuned: Path
    adapter: Path
    merged: Path


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    data = tmp_path_factory.mktemp("data")
    base = make_model("llama-untied", tmp_path_factory.mktemp("base"), tokenizer_from=tiny_model)
    tuned, adapter, merged = data / "tuned", data / "adapter", data / "merged"
    shutil.copytree(base, tuned)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(tuned)
    make_adapter(base, adapter, merged=merged)
    return Folder(data=data, base=base, tuned=tuned, adapter=adapter, merged=merged)


@pytest.fixture
def client(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherClient]:
    """Of a teacher that serves ``folder.base``, keeps no labels, and may be told to serve others at any time."""
    monkeypatch.setattr(models, "IDLE_SECONDS", 0)
    options = TeacherOptions(model=str(folder.base), engine="transformers", port=0, label_dtype="float32")
    with (
        running_teacher(options, settings=Settings(data_dir=folder.data, label_cache_gib=0)) as address,
        TeacherClient(address, patience_seconds=1) as client,
    ):
        yield client


def make_adapter(base: Path, adapter: Path, *, merged: Path | None = None, base_name: str = "") -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    # init_lora_weights=False: both factors random, so that the adapter changes something.
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(adapter)
    if base_name:
        change_json(adapter / "adapter_config.json", base_model_name_or_path=base_name)
    if merged is not None:
        shutil.copytree(base, merged)
        adapted.merge_and_unload().save_pretrained(merged)


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def anew(client: TeacherClient) -> TeacherClient:
    """A student that comes now, and so knows nothing of the weights before."""
    return TeacherClient(client.address, patience_seconds=1)


def assert_serves(client: TeacherClient, directory: Path) -> None:
    """Labels, head and continuations are those of plain transformers on the directory."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with anew(client) as student:
        head = student.fetch_lm_head()
        answers = {answer.id: answer for answer in student.score(SEQUENCES, LabelOptions())}
        (continuation,) = student.generate([Prompt(id="x", token_ids=[5, 6, 7])], DecodeOptions(max_new_tokens=6))
    for sequence in SEQUENCES:
        with torch.no_grad():
            expected = model(torch.tensor([sequence.token_ids])).logits[0].log_softmax(-1).numpy()
        logits = torch.from_numpy(head.logits(answers[sequence.id].labels.hidden_ND))
        where = np.array(sequence.label_positions) - 1
        assert np.abs(logits.log_softmax(-1).numpy() - expected[where]).max() < 2e-4
    ids = torch.tensor([[5, 6, 7]])
    written = model.generate(ids, max_new_tokens=len(continuation.token_ids), do_sample=False)[0, 3:].tolist()
    assert list(continuation.token_ids) == written[: len(continuation.token_ids)]


def break_weights(directory: Path) -> None:
    """One weight is no number."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
