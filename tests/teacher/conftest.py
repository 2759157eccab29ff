from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.contract.sequences import TokenSequence
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.models import make_model
from tests.teacher.serving import running_teacher


@pytest.fixture(scope="session")
def model_of(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model of an architecture in tests/teacher/models.py."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp(name), tokenizer_from=tiny_model)
        return made[name]

    return get


@pytest.fixture(scope="session")
def mock_address(tiny_model: Path) -> Iterator[str]:
    with running_teacher(TeacherOptions(model=str(tiny_model), engine="mock", port=0)) as address:
        yield address


@pytest.fixture
def mock_teacher(mock_address: str) -> Iterator[TeacherClient]:
    with TeacherClient(mock_address, patience_seconds=5) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_address(model_of: Callable[[str], Path]) -> Iterator[str]:
    """A transformers teacher with float32 labels."""
    options = TeacherOptions(model=str(model_of("llama-padded")), engine="transformers", port=0, label_dtype="float32")
    with running_teacher(options) as address:
        yield address


@pytest.fixture
def tiny_teacher(tiny_address: str) -> Iterator[TeacherClient]:
    with TeacherClient(tiny_address, patience_seconds=5) as client:
        yield client


@pytest.fixture(scope="session")
def sequences() -> list[TokenSequence]:
    """Twelve sequences of 5 to 60 tokens, labelled in their second half."""
    made = []
    for index in range(12):
        length = 5 + 5 * index
        ids = [(7 * index + 13 * place * place + 3) % 290 for place in range(length)]
        made.append(TokenSequence(id=f"s{index}", token_ids=ids, label_positions=list(range(length // 2, length))))
    return made
