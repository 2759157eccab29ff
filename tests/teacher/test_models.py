"""Other weights without a restart: what is served after the switch, and what is refused."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import (
    HandshakeError,
    InvalidInputError,
    ModelNotFoundError,
    OverloadedError,
    SmoothKDError,
    TeacherError,
    TeacherUnavailableError,
)
from services.contract.sequences import DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.settings import Settings
from services.contract.soft_labels import ScoredSequence
from student_trainer import teacher_loading
from student_trainer.teacher_client import TeacherClient
from teacher_server import engines, models, served
from teacher_server.batching import BatchingEngine
from teacher_server.determinism import determinism_spread
from teacher_server.options import TeacherOptions
from teacher_server.served import Checked, Served
from teacher_server.transformers_engine import TransformersModel
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


@pytest.fixture(autouse=True)
def no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "IDLE_SECONDS", 0)


@pytest.fixture
def client(folder: Folder) -> Iterator[TeacherClient]:
    options = TeacherOptions(model=str(folder.base), engine="transformers", port=0, label_dtype="float32")
    with (
        running_teacher(options, settings=Settings(data_dir=folder.data, label_cache_gib=0)) as address,
        TeacherClient(address, patience_seconds=1) as client,
    ):
        yield client


@pytest.fixture(params=[False, True], ids=["beside", "in place"])
def either(request: pytest.FixtureRequest, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherClient]:
    """A client of an engine that loads weights beside the old ones, and of one that loads them in their place."""
    monkeypatch.setattr(engines._TransformersSource, "in_place", request.param)
    options = TeacherOptions(model=str(folder.base), engine="transformers", port=0, label_dtype="float32")
    with (
        running_teacher(options, settings=Settings(data_dir=folder.data, label_cache_gib=0)) as address,
        TeacherClient(address, patience_seconds=5) as client,
    ):
        yield client


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


def test_a_checkpoint_an_adapter_and_the_start_again(either: TeacherClient, folder: Folder) -> None:
    client = either
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


def _nan(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


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
        (_nan, TeacherError, "not finite"),
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


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_other_base, HandshakeError, "adapter of some/other"),
        (_other_type, InvalidInputError, "type IA3"),
        (_half_adapter, ModelNotFoundError, "lacks the tensor"),
        (_nan_adapter, ModelNotFoundError, "NaN|finite"),
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


def test_after_a_failure_in_place_the_old_weights_come_back(either: TeacherClient, folder: Folder) -> None:
    directory = folder.data / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(folder.tuned, directory)
    _nan(directory)
    before = either.describe().fingerprint
    with pytest.raises(TeacherError, match="not finite"):
        either.load_model(str(directory))
    assert_serves(either, folder.base)
    with anew(either) as student:
        assert student.describe().fingerprint == before


def test_a_request_under_way_ends_before_its_weights_go(folder: Folder) -> None:
    """On the weights it began with, or, once it has been waited for long enough, in an error that says to ask again."""

    async def switch(*, patience: float, work: float) -> str:
        engine = BatchingEngine(TransformersModel(folder.base))
        serving = Served(engine, cast(Checked, None))

        async def request() -> str:
            with serving.in_use():
                await asyncio.sleep(work)
                return "done"

        asking = asyncio.ensure_future(request())
        await asyncio.sleep(0)
        assert serving.idle_seconds() == 0
        served.DRAIN_SECONDS, kept = patience, served.DRAIN_SECONDS
        try:
            await serving.drain()
            assert asking.done()
            return await asking
        except TeacherUnavailableError as error:
            return error.what
        finally:
            served.DRAIN_SECONDS = kept
            serving.retire()

    assert asyncio.run(switch(patience=30, work=0.2)) == "done"
    assert asyncio.run(switch(patience=0, work=30)) == "the teacher has gone over to other weights"


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


def test_weights_written_over_others_are_loaded_again(client: TeacherClient, folder: Folder) -> None:
    directory = folder.data / "rewritten"
    shutil.copytree(folder.tuned, directory)
    client.load_model(str(directory))
    shutil.copy(folder.merged / "model.safetensors", directory / "model.safetensors")
    client.load_model(str(directory))
    assert_serves(client, folder.merged)


def test_weights_in_use_stay_for_a_while(
    client: TeacherClient, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(teacher_loading, "TURN_SECONDS", 0)
    assert len(list(client.score(SEQUENCES))) == len(SEQUENCES)
    impatient = TeacherClient(client.address, patience_seconds=0)
    with closing(impatient), pytest.raises(OverloadedError, match="students are using") as refused:
        impatient.load_model(str(folder.tuned))
    assert 0 < float(refused.value.details["retry_after_seconds"]) <= 0.5
    assert_serves(client, folder.base)
    # Half a second later nobody is using them any more.
    monkeypatch.setattr(teacher_loading, "TURN_SECONDS", 60)
    client.load_model(str(folder.tuned))
    assert_serves(client, folder.tuned)


def test_two_students_of_two_teachers_take_turns(
    either: TeacherClient, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets the labels of its own teacher alone, whoever is served when it asks."""
    monkeypatch.setattr(models, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(models, "IDLE_SECONDS", 0.2)

    def learn(directory: Path) -> list[float]:
        with TeacherClient(either.address, patience_seconds=20) as student:
            student.load_model(str(directory))
            return [
                float(answer.token_logprobs_P[0])
                for _ in range(8)
                for answer in sorted(student.score(SEQUENCES), key=lambda answer: answer.id)
            ]

    def expected(directory: Path) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        logprobs = []
        for sequence in SEQUENCES:
            with torch.no_grad():
                logits = model(torch.tensor([sequence.token_ids])).logits[0].log_softmax(-1)
            position = sequence.label_positions[0]
            logprobs.append(float(logits[position - 1, sequence.token_ids[position]]))
        return logprobs * 8

    with ThreadPoolExecutor(2) as students:
        learnt = list(students.map(learn, [folder.tuned, folder.merged]))
    np.testing.assert_allclose(learnt[0], expected(folder.tuned), atol=2e-4)
    np.testing.assert_allclose(learnt[1], expected(folder.merged), atol=2e-4)


def test_every_replica_is_told(folder: Folder) -> None:
    options = TeacherOptions(model=str(folder.base), engine="transformers", port=0, label_dtype="float32")
    settings = Settings(data_dir=folder.data, label_cache_gib=0)
    with running_teacher(options, settings=settings) as first, running_teacher(options, settings=settings) as second:
        with TeacherClient(f"{first},{second}") as client:
            client.load_model("tuned")
            tuned = client.describe().fingerprint
        for address in (first, second):
            with TeacherClient(address) as client:
                assert client.describe().fingerprint == tuned
        # One of them loses it, as by a restart: a student that has begun does not notice.
        with TeacherClient(f"{first},{second}") as student, TeacherClient(second) as other:
            student.load_model("tuned")
            other.load_model("")
            for _ in range(4):
                assert len(list(student.score(SEQUENCES))) == len(SEQUENCES)
            other._loaded = other._info = None
            assert other.describe().fingerprint == tuned


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


def test_the_spread_is_told_to_students(client: TeacherClient) -> None:
    assert 0 <= client.describe().determinism_spread < 1e-4


def test_an_engine_that_answers_inconsistently_is_reported(folder: Folder) -> None:
    class Noisy(BatchingEngine):
        async def score(self, sequence: TokenSequence, options: LabelOptions) -> ScoredSequence:
            scored = await super().score(sequence, options)
            noise = 0.25 * (sequence.id == "copy-3")
            return replace(scored, token_logprobs_P=scored.token_logprobs_P + np.float32(noise))

    engine = Noisy(TransformersModel(folder.base))
    try:
        assert asyncio.run(determinism_spread(engine)) == pytest.approx(0.25, abs=1e-4)
    finally:
        engine.close()
