"""Other weights without a restart: what is served after the switch, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from services.contract.errors import (
    HandshakeError,
    InvalidInputError,
    ModelNotFoundError,
    SmoothKDError,
    TeacherError,
)
from services.contract.settings import Settings
from student_trainer.teacher_client import TeacherClient
from teacher_server import models
from teacher_server.options import TeacherOptions
from tests.teacher.loadable import SEQUENCES, Folder, anew, assert_serves, break_weights, change_json, make_adapter
from tests.teacher.loadable import client as client
from tests.teacher.loadable import folder as folder
from tests.teacher.serving import running_teacher


@pytest.fixture(autouse=True)
def no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "IDLE_SECONDS", 0)


def test_a_checkpoint_an_adapter_and_the_start_again(client: TeacherClient, folder: Folder) -> None:
    fingerprints = {client.describe().fingerprint}
    assert_serves(client, folder.base)
    for name, expected in ((folder.tuned, folder.tuned), (folder.adapter, folder.merged), ("", folder.base)):
        client.load_model(str(name))
        assert_serves(client, expected)
        with anew(client) as student:
            assert student.describe().model == (str(name) or str(folder.base))
            fingerprints.add(student.describe().fingerprint)
    assert len(fingerprints) == 3


def test_a_server_started_with_an_adapter_serves_it(folder: Folder, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    make_adapter(folder.base, adapter, base_name="another/name")
    options = TeacherOptions(
        model=str(adapter), base=str(folder.base), engine="transformers", port=0, label_dtype="float32"
    )
    settings = Settings(data_dir=tmp_path, label_cache_gib=0)
    with running_teacher(options, settings=settings) as address, TeacherClient(address) as client:
        assert_serves(client, folder.merged)
        client.load_model("adapter")
        assert client.describe().model == str(adapter)


def test_requests_for_the_weights_before_are_refused_and_none_is_answered_by_others(
    client: TeacherClient, folder: Folder
) -> None:
    assert len(list(client.score(SEQUENCES))) == len(SEQUENCES)
    with anew(client) as other:
        other.load_model(str(folder.tuned))
    with pytest.raises(HandshakeError, match=f"serves {folder.tuned}"):
        list(client.score(SEQUENCES))
    with pytest.raises(HandshakeError, match=f"serves {folder.tuned}"):
        client.fetch_lm_head()


def test_the_start_model_is_described_by_name_while_another_is_served(client: TeacherClient, folder: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder.base)
    before = client.handshake(tokenizer, str(folder.base)).fingerprint
    client.load_model(str(folder.tuned))
    with anew(client) as student:
        assert student.handshake(tokenizer, str(folder.base)).fingerprint == before
        assert student.handshake(tokenizer, str(folder.tuned)).fingerprint != before
        with pytest.raises(HandshakeError, match=f"serves {folder.tuned}, not some/other"):
            student.handshake(tokenizer, "some/other")


def _cut_short(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _wider(directory: Path) -> None:
    change_json(directory / "config.json", intermediate_size=96)


def _fewer_tensors(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def _other_words(directory: Path) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


def _other_splitting(directory: Path) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (break_weights, TeacherError, "not finite"),
        (_cut_short, ModelNotFoundError, "cannot be read"),
        (_wider, HandshakeError, "intermediate_size is 96 instead of 64"),
        (_fewer_tensors, HandshakeError, "q_proj.weight has the shape none"),
        (_other_words, HandshakeError, "other ids"),
        (_other_splitting, HandshakeError, "same text becomes other ids"),
        (lambda directory: (directory / "config.json").unlink(), ModelNotFoundError, "lacks config.json"),
        (lambda directory: (directory / "model.safetensors").unlink(), ModelNotFoundError, "lacks weights"),
        (lambda directory: (directory / "tokenizer.json").unlink(), ModelNotFoundError, "lacks a tokenizer"),
        (lambda directory: (directory / "config.json").write_text("{"), ModelNotFoundError, "cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_cannot_be_served_leaves_the_old_one_serving(
    client: TeacherClient, folder: Folder, damage: Callable, error: type[SmoothKDError], words: str
) -> None:
    directory = folder.data / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(folder.tuned, directory)
    damage(directory)
    client.load_model(str(folder.tuned))
    with pytest.raises(error, match=words):
        client.load_model(str(directory))
    assert_serves(client, folder.tuned)


def _other_base(directory: Path) -> None:
    change_json(directory / "adapter_config.json", base_model_name_or_path="some/other")


def _other_type(directory: Path) -> None:
    change_json(directory / "adapter_config.json", peft_type="IA3")


def _change_adapter(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _half_adapter(directory: Path) -> None:
    _change_adapter(directory, lambda tensors: tensors.pop(min(tensors)))


def _nan_adapter(directory: Path) -> None:
    _change_adapter(directory, lambda tensors: tensors[min(tensors)].fill_(float("nan")))


def _of_a_wider_model(directory: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if "lora_A" in name)
        tensors[name] = tensors[name].repeat(1, 2)

    _change_adapter(directory, widen)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_other_base, HandshakeError, "adapter of some/other"),
        (_other_type, InvalidInputError, "type IA3"),
        (_half_adapter, ModelNotFoundError, "lacks the tensor"),
        (_nan_adapter, ModelNotFoundError, "NaN|finite"),
        (_of_a_wider_model, ModelNotFoundError, "size mismatch for .*lora_A"),
        (lambda directory: (directory / "adapter_model.safetensors").unlink(), ModelNotFoundError, "lacks adapter_"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_adapter_that_cannot_be_served_leaves_the_old_weights_serving(
    client: TeacherClient, folder: Folder, damage: Callable, error: type[SmoothKDError], words: str
) -> None:
    directory = folder.data / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(folder.adapter, directory)
    damage(directory)
    with pytest.raises(error, match=words):
        client.load_model(str(directory))
    assert_serves(client, folder.base)


def test_only_allowed_directories_are_loaded(client: TeacherClient, folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(folder.tuned, tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match=r"may not load .*outside"):
        client.load_model(str(tmp_path / "elsewhere"))
    link = folder.data / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match="may not load"):
        client.load_model(str(link))
    with pytest.raises(ModelNotFoundError, match="sees no directory"):
        client.load_model(str(folder.data / "nothing"))
    options = TeacherOptions(
        model=str(folder.base), engine="transformers", port=0, allow_models_below=(tmp_path,), label_dtype="float32"
    )
    settings = Settings(data_dir=folder.data, label_cache_gib=0)
    with running_teacher(options, settings=settings) as address, TeacherClient(address) as allowed:
        allowed.load_model(str(tmp_path / "elsewhere"))
        assert_serves(allowed, folder.tuned)


def test_the_command_line_loads_a_teacher(client: TeacherClient, folder: Folder) -> None:
    def load(model: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "services.cli.main", "load-teacher", str(model)]
        where = os.environ | {"SMOOTHKD_TEACHER_ADDRESS": client.address}
        return subprocess.run(command, env=where, capture_output=True, text=True, timeout=60)

    loaded = load(folder.tuned)
    with anew(client) as student:
        assert loaded.stdout == f"{folder.tuned} (fingerprint {student.describe().fingerprint})\n", loaded.stderr
    assert_serves(client, folder.tuned)
    refused = load(folder.base.parent)
    assert refused.returncode == 2
    assert "may not load" in refused.stderr
    assert "Traceback" not in refused.stderr
