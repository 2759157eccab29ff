"""Students of several teachers at one address take turns; replicas are told each."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.contract.errors import (
    OverloadedError,
    TeacherUnavailableError,
)
from services.contract.settings import Settings
from student_trainer import teacher_loading
from student_trainer.teacher_client import TeacherClient
from teacher_server import models, served
from teacher_server.batching import BatchingEngine
from teacher_server.options import TeacherOptions
from teacher_server.served import Checked, Served
from teacher_server.transformers_engine import TransformersModel
from tests.teacher.loadable import SEQUENCES, Folder, assert_serves
from tests.teacher.loadable import folder as folder
from tests.teacher.serving import running_teacher
from tests.teacher.test_switching import client as client


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
    client: TeacherClient, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets the labels of its own teacher alone, whoever is served when it asks."""
    monkeypatch.setattr(models, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(models, "IDLE_SECONDS", 0.2)

    def learn(directory: Path) -> list[float]:
        with TeacherClient(client.address, patience_seconds=20) as student:
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
        with TeacherClient(second) as later:
            assert later.describe().fingerprint == tuned
