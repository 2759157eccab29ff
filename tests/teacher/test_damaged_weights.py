"""Weights that are not all numbers, or not all there: what they spoil fails aloud, and nothing else does."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.contract.distillation_spec import StudentSpec
from services.contract.errors import ModelNotFoundError, TeacherError, UnsupportedError
from services.contract.settings import Settings
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from services.labels.cache import LabelCache
from student_trainer.student import load_student
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher

SPOILT = 299


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(data_dir=tmp_path_factory.mktemp("data"), label_cache_gib=1)


@pytest.fixture(scope="module")
def stub(
    model_of: Callable[[str], Path], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TeacherServiceStub]:
    """Of a teacher whose embedding of one token is NaN, which its start cannot notice."""
    directory = tmp_path_factory.mktemp("spoilt") / "model"
    shutil.copytree(model_of("llama-untied"), directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.get_input_embeddings().weight[SPOILT] = float("nan")
    model.save_pretrained(directory)
    options = TeacherOptions(model=str(directory), engine="transformers", port=0)
    with running_teacher(options, settings=settings) as address, grpc.insecure_channel(address) as channel:
        yield TeacherServiceStub(channel)


def answers(stream: Any) -> tuple[list[str], Any]:
    """The ids that came, in order, and the error that ended the stream."""
    came: list[str] = []
    try:
        came.extend(answer.id for answer in stream)
    except grpc.RpcError as error:
        return sorted(came), error
    raise AssertionError(f"all were answered: {came}")


@pytest.mark.parametrize(
    "options", [{"encoding": 1}, {"encoding": 2, "k": 5}, {"encoding": 3}, {"encoding": 4, "draws": 8}], ids=str
)
def test_labels_that_are_no_numbers_are_neither_sent_nor_kept(
    options: dict[str, int], stub: TeacherServiceStub, settings: Settings
) -> None:
    sequences = [
        pb.ScoreSequence(id=str(n), token_ids=[7, n, SPOILT if n == 2 else 9, 11, 12], label_positions=[1, 3, 4])
        for n in range(5)
    ]
    request = pb.ScoreSequencesRequest(options=pb.LabelOptions(**options), sequences=sequences)
    with LabelCache(settings.resolved_label_cache_dir, max_bytes=2**30) as cache:
        before = cache.stats().entries
    answered, error = answers(stub.ScoreSequences(request, timeout=30))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "sequence '2' failed: the teacher's" in error.details()
    assert "not finite" in error.details()
    assert answered == ["0", "1", "3", "4"]
    with LabelCache(settings.resolved_label_cache_dir, max_bytes=2**30) as cache:
        assert cache.stats().entries == before + 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_not_decoded_from_what_is_no_number(temperature: float, stub: TeacherServiceStub) -> None:
    prompts = [pb.GeneratePrompt(id=str(n), token_ids=[7, n, SPOILT if n == 1 else 9]) for n in range(3)]
    request = pb.GenerateSequencesRequest(prompts=prompts, max_new_tokens=4, temperature=temperature)
    answered, error = answers(stub.GenerateSequences(request, timeout=30))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "sequence '1' failed: the teacher's logits are not finite" in error.details()
    assert answered == ["0", "2"]


def test_weights_that_were_cut_short_are_refused(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "cut"
    shutil.copytree(model_of("llama-untied"), directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    options = TeacherOptions(model=str(directory), engine="transformers", port=0)
    with pytest.raises(TeacherError, match=r"cut cannot be loaded: .*not fully covered"), running_teacher(options):
        pass


class Trap:
    """Calls what it was made with when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self._command,)


def test_weights_in_a_pickle_run_no_code(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    directory, sprung = tmp_path / "trap", tmp_path / "sprung"
    shutil.copytree(model_of("llama-untied"), directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(f"touch {sprung}"), protocol=2))
    options = TeacherOptions(model=str(directory), engine="transformers", port=0)
    with pytest.raises(UnsupportedError, match="has no weights as safetensors, and pickles"), running_teacher(options):
        pass
    # Where something else there is called so, the libraries would go back to the pickle.
    shutil.copy(next(model_of("llama-untied").glob("*.safetensors")), directory / "adapter.safetensors")
    with pytest.raises(TeacherError, match="cannot be loaded"), running_teacher(options):
        pass
    with pytest.raises(ModelNotFoundError, match=r"cannot be loaded as a student: .*model\.safetensors"):
        load_student(StudentSpec(model=str(directory)), Settings(), vocab_size=300)
    assert not sprung.exists()
