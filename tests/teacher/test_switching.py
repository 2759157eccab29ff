"""The moment of a switch: what is under way ends first, and after a failure the weights before come back."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.contract.errors import HandshakeError, TeacherError, TeacherUnavailableError
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.settings import Settings
from student_trainer.teacher_client import TeacherClient
from teacher_server import engines, models
from teacher_server.engine import Engine
from teacher_server.options import TeacherOptions
from teacher_server.weights import Weights
from tests.teacher.loadable import Folder, anew, assert_serves, break_weights
from tests.teacher.loadable import folder as folder
from tests.teacher.serving import running_teacher, wait_until

MANY = [
    TokenSequence(id=str(n), token_ids=[(31 * n + 7 * p) % 290 for p in range(200)], label_positions=range(1, 200))
    for n in range(300)
]


class OneAtATime(engines._TransformersSource):
    """Memory for one model, as vLLM's processes have: the weights before are gone when others are loaded."""

    in_place = True
    engine: Engine | None = None

    async def load(self, weights: Weights) -> Engine:
        if self.engine is not None:
            self.engine.close()
        self.engine = await super().load(weights)
        return self.engine


@pytest.fixture(params=[engines._TransformersSource, OneAtATime], ids=["beside", "in place"])
def client(request: pytest.FixtureRequest, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherClient]:
    monkeypatch.setattr(models, "IDLE_SECONDS", 0)
    monkeypatch.setitem(engines._SOURCES, "transformers", request.param)
    options = TeacherOptions(model=str(folder.base), engine="transformers", port=0, label_dtype="float32")
    with (
        running_teacher(options, settings=Settings(data_dir=folder.data, label_cache_gib=0)) as address,
        TeacherClient(address, patience_seconds=0) as client,
    ):
        yield client


def test_after_a_failure_the_weights_before_serve_on(client: TeacherClient, folder: Folder) -> None:
    directory = folder.data / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(folder.tuned, directory)
    break_weights(directory)
    before = client.describe().fingerprint
    with pytest.raises(TeacherError, match="not finite"):
        client.load_model(str(directory))
    assert_serves(client, folder.base)
    with anew(client) as student:
        assert student.describe().fingerprint == before


def test_a_request_under_way_ends_on_the_weights_it_began_with(client: TeacherClient, folder: Folder) -> None:
    """Without asking again: its student has no patience. Those who come meanwhile are told to wait, or are served."""
    model = AutoModelForCausalLM.from_pretrained(folder.base)
    stream = client.score(MANY, LabelOptions())
    scored = {(first := next(stream)).id: first}
    loaded = threading.Event()

    def load() -> None:
        with TeacherClient(client.address, patience_seconds=60) as other:
            other.load_model(str(folder.tuned))
            loaded.set()

    loading = threading.Thread(target=load)
    loading.start()
    with TeacherClient(client.address, patience_seconds=0) as other:

        def has_begun() -> bool:
            try:
                return other._get_teacher("", probe_texts=()).model == str(folder.tuned)
            except TeacherUnavailableError:
                return True

        wait_until(has_begun)
    scored |= {answer.id: answer for answer in stream}
    loading.join(60)
    assert loaded.is_set()
    assert len(scored) == len(MANY)
    for sequence in MANY[::60]:
        with torch.no_grad():
            hidden = model.model(torch.tensor([sequence.token_ids])).last_hidden_state[0, :-1].numpy()
        np.testing.assert_allclose(scored[sequence.id].labels.hidden_ND, hidden, atol=1e-4)
    assert_serves(client, folder.tuned)


def test_labels_in_the_cache_outlast_their_weights(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "IDLE_SECONDS", 0)
    settings = Settings(data_dir=folder.data, label_cache_dir=tmp_path / "labels", label_cache_gib=1)
    options = TeacherOptions(model=str(folder.base), engine="transformers", port=0, label_dtype="float32")
    with (
        running_teacher(options, settings=settings) as address,
        TeacherClient(address, patience_seconds=0) as student,
        TeacherClient(address) as other,
    ):
        first = {answer.id: answer.labels.hidden_ND for answer in student.score(MANY[:3])}
        other.load_model(str(folder.tuned))
        again = {answer.id: answer.labels.hidden_ND for answer in student.score(MANY[:3])}
        assert first.keys() == again.keys()
        assert all(np.array_equal(first[name], again[name]) for name in first)
        with pytest.raises(HandshakeError, match=f"serves {folder.tuned} .* by now"):
            list(student.score(MANY[:5]))
        tuned = {answer.id: answer.labels.hidden_ND for answer in other.score(MANY[:3])}
        assert not any(np.array_equal(first[name], tuned[name]) for name in first)
        other.load_model("")
        assert len(list(student.score(MANY[:5]))) == 5


def test_weights_in_memory_do_not_follow_their_files(client: TeacherClient, folder: Folder) -> None:
    """And files written over others are other weights, whatever their directory's name."""
    directory = folder.data / "rewritten"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(folder.tuned, directory)
    client.load_model(str(directory))
    with TeacherClient(client.address, patience_seconds=0) as student:
        student.describe()
        (directory / "model.safetensors").write_bytes((folder.merged / "model.safetensors").read_bytes())
        assert_serves(client, folder.tuned)
        client.load_model(str(directory))
        assert_serves(client, folder.merged)
        with pytest.raises(HandshakeError, match="no longer"):
            list(student.score(MANY[:1]))
