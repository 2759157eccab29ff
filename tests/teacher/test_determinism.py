"""What the make-up of batches does to labels is measured and told."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import ScoredSequence
from student_trainer.teacher_client import TeacherClient
from teacher_server import models
from teacher_server.batching import BatchingEngine
from teacher_server.determinism import determinism_spread
from teacher_server.transformers_engine import TransformersModel
from tests.teacher.loadable import Folder
from tests.teacher.loadable import client as client
from tests.teacher.loadable import folder as folder


@pytest.fixture(autouse=True)
def no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "IDLE_SECONDS", 0)


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
