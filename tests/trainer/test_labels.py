import threading
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from services.contract.errors import CancelledError, InvalidInputError, TeacherError
from services.contract.sequences import LabelOptions
from services.contract.soft_labels import ExactLabels, TopKLabels, checked_positions
from student_trainer.data import Example, encode_examples
from student_trainer.labels import LabelPrefetcher, label_request, soft_targets
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher
from tests.trainer.conftest import RECORDS


@pytest.fixture(scope="module")
def slow_teacher(tiny_model: Path) -> Iterator[str]:
    """Takes 0.3 s for every sequence."""
    options = TeacherOptions(model=str(tiny_model), engine="mock", port=0, mock_seconds=0.3)
    with running_teacher(options) as address:
        yield address


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    return encode_examples(RECORDS, AutoTokenizer.from_pretrained(tiny_model), max_length=256)


@pytest.mark.parametrize("options", [LabelOptions(), LabelOptions(encoding="top_k", k=3)])
def test_each_batch_gets_its_own_labels_in_its_own_order(
    teacher_address: str, examples: list[Example], options: LabelOptions
) -> None:
    with TeacherClient(teacher_address) as client:
        alone = {
            scored.id: scored
            for example in examples
            for scored in client.score([label_request(example, id=str(example.index))], options)
        }
    with LabelPrefetcher({"teacher": TeacherClient(teacher_address)}, options=options) as labels:
        batches = [examples[3:6], [examples[9], examples[0]], examples[3:4]]
        tickets = [labels.request(batch) for batch in batches]
        for ticket, batch in reversed(list(zip(tickets, batches, strict=True))):
            for scored, example in zip(labels.take(ticket).scored["teacher"], batch, strict=True):
                expected = alone[str(example.index)]
                assert scored.sequence_hash == expected.sequence_hash
                np.testing.assert_allclose(scored.token_logprobs_P, expected.token_logprobs_P, atol=1e-4)
                checked = checked_positions(len(example.response_positions), options.encoding)
                assert len(scored.token_logprobs_P) == len(checked)


def test_the_wait_for_labels_is_measured(slow_teacher: str, examples: list[Example]) -> None:
    with LabelPrefetcher({"teacher": TeacherClient(slow_teacher)}, options=LabelOptions()) as labels:
        ticket = labels.request(examples[:1])
        labels.take(ticket)
        assert labels.waited_seconds > 0.2


def test_an_error_of_the_teacher_is_raised_in_the_step(teacher_address: str) -> None:
    beyond = Example(index=0, token_ids=[5, 100_000, 7], prompt_length=1)
    with LabelPrefetcher({"teacher": TeacherClient(teacher_address)}, options=LabelOptions()) as labels:
        ticket = labels.request([beyond])
        with pytest.raises(InvalidInputError, match="100000"):
            labels.take(ticket)


def test_a_teacher_that_goes_away_is_an_error(tiny_model: Path, examples: list[Example]) -> None:
    with running_teacher(TeacherOptions(model=str(tiny_model), engine="mock", port=0)) as address:
        labels = LabelPrefetcher({"teacher": TeacherClient(address, patience_seconds=0.5)}, options=LabelOptions())
        labels.take(labels.request(examples[:1]))
    with labels, pytest.raises(TeacherError):
        labels.take(labels.request(examples[:1]))


def test_closing_ends_requests_under_way_and_every_thread(slow_teacher: str, examples: list[Example]) -> None:
    with LabelPrefetcher({"teacher": TeacherClient(slow_teacher)}, options=LabelOptions()) as labels:
        for _ in range(20):
            labels.request(examples)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("labels")]


def test_a_stop_ends_the_wait(slow_teacher: str, examples: list[Example]) -> None:
    client = TeacherClient(slow_teacher)
    with LabelPrefetcher({"teacher": client}, options=LabelOptions(), should_stop=lambda: True) as labels:
        ticket = labels.request(examples * 5)
        with pytest.raises(CancelledError):
            labels.take(ticket)


def test_targets_of_a_batch_are_joined_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(rows, 4)).astype(ml_dtypes.bfloat16) for rows in (2, 3)]
    targets = soft_targets(
        [ExactLabels(hidden_ND=part) for part in states], teacher_head=object(), device=torch.device("cpu")
    )
    assert targets.hidden_NE.dtype == torch.bfloat16
    np.testing.assert_array_equal(targets.hidden_NE.float().numpy(), np.concatenate(states).astype(np.float32))

    parts = [
        TopKLabels(
            ids_NK=rng.integers(0, 9, (rows, 2), dtype=np.int32),
            logprobs_NK=rng.normal(size=(rows, 2)).astype(np.float16),
            tail_mass_N=rng.random(rows, dtype=np.float32),
        )
        for rows in (1, 2)
    ]
    targets = soft_targets(parts, teacher_head=None, device=torch.device("cpu"))
    np.testing.assert_array_equal(targets.ids_NK.numpy(), np.concatenate([part.ids_NK for part in parts]))
    assert targets.ids_NK.dtype == torch.int64
    np.testing.assert_array_equal(targets.logprobs_NK.numpy(), np.concatenate([part.logprobs_NK for part in parts]))
    np.testing.assert_array_equal(targets.tail_mass_N.numpy(), np.concatenate([part.tail_mass_N for part in parts]))
