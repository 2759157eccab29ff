"""Engines without a server: fingerprints, the mock's promises, and how requests share batches."""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.contract.errors import InvalidInputError, ModelNotFoundError, TeacherUnavailableError
from services.contract.sequences import DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ScoredSequence
from teacher_server.batching import BatchingEngine
from teacher_server.mock_engine import MockModel
from teacher_server.options import TeacherOptions
from teacher_server.transformers_engine import TransformersModel


def sequence(token_ids: list[int], *, name: str = "x") -> TokenSequence:
    return TokenSequence(id=name, token_ids=token_ids, label_positions=list(range(1, len(token_ids))))


def fingerprint(directory: Path, **options: Any) -> str:
    return TransformersModel(directory, **options).card.fingerprint


def test_equal_files_have_equal_fingerprints_wherever_they_lie(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    assert fingerprint(copy, name="another name") == fingerprint(tiny_model)


def test_one_changed_weight_changes_the_fingerprint(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] += 1e-3
    shutil.copytree(tiny_model, tmp_path / "changed")
    model.save_pretrained(tmp_path / "changed")
    assert fingerprint(tmp_path / "changed") != fingerprint(tiny_model)


def test_tokenizer_config_and_precision_change_the_fingerprint(tiny_model: Path, tmp_path: Path) -> None:
    made = {fingerprint(tiny_model), fingerprint(tiny_model, dtype="bfloat16")}
    for file, key, value in (
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
        ("config.json", "rms_norm_eps", 1e-3),
    ):
        copy = shutil.copytree(tiny_model, tmp_path / file)
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | {key: value}))
        made.add(fingerprint(copy))
    assert len(made) == 4


def test_a_tokenizer_larger_than_the_model_is_refused(
    tiny_model: Path, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(model_of("llama-untied"), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(300)
    model.save_pretrained(directory)
    with pytest.raises(InvalidInputError, match="320 ids, the model's output head only 300 rows"):
        TransformersModel(directory)


def test_every_stop_token_of_the_checkpoint_counts(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "stops")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7], "repetition_penalty": 1.9}))
    model = TransformersModel(copy)
    assert model.card.stop_token_ids == (0, 2, 7)
    assert model._model.generation_config.repetition_penalty is None


@pytest.mark.parametrize(
    ("label_dtype", "weights", "expected"),
    [
        ("auto", "float32", "bfloat16"),
        ("auto", "float16", "float16"),
        ("auto", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_states_travel_in_the_models_own_16_bits(label_dtype: str, weights: str, expected: str) -> None:
    assert TeacherOptions(model="x", label_dtype=label_dtype).resolved_label_dtype(weights) == expected


def score(model: MockModel, *sequences: TokenSequence) -> list[ScoredSequence]:
    return model.score([(each, LabelOptions()) for each in sequences])


def test_mock_states_depend_on_the_prefix_and_on_nothing_else() -> None:
    model = MockModel("300")
    (one,) = score(model, sequence([5, 6, 7, 8, 9]))
    (other,) = score(model, sequence([5, 6, 7, 1, 9]))
    states, changed = one.labels.hidden_ND, other.labels.hidden_ND
    np.testing.assert_array_equal(states[:3], changed[:3])
    assert (np.abs(states[3] - changed[3]).max()) > 0.5
    swapped = score(model, sequence([6, 5, 7, 8, 9]))[0].labels.hidden_ND
    assert (np.abs(states - swapped).max(axis=1) > 0.5).all()


def test_mock_states_are_spread_like_normed_states() -> None:
    (labels,) = score(MockModel("300"), sequence([index % 300 for index in range(1000)]))
    states = labels.labels.hidden_ND
    assert abs(states.mean()) < 0.02
    assert abs(states.std() - 1) < 0.02
    # Neighbouring states are unrelated.
    assert abs((states[:-1] * states[1:]).mean()) < 0.02


def test_the_mock_engine_is_the_same_in_every_process_and_needs_no_torch(tiny_model: Path) -> None:
    code = (
        "import sys, hashlib\n"
        "from services.contract.sequences import LabelOptions, TokenSequence\n"
        "from teacher_server.mock_engine import MockModel\n"
        "import teacher_server.server\n"
        f"model = MockModel({str(tiny_model)!r})\n"
        "item = TokenSequence(id='x', token_ids=[5, 6, 7, 8], label_positions=[1, 2, 3])\n"
        "states = model.score([(item, LabelOptions())])[0].labels.hidden_ND\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(model.card.fingerprint, hashlib.sha256(states.tobytes() + model.head.weight_VD.tobytes()).hexdigest())\n"
    )
    runs = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(2)}
    assert len(runs) == 1
    assert MockModel(str(tiny_model)).card.fingerprint.encode() in runs.pop()


@pytest.mark.parametrize("name", ["1", "/nowhere"])
def test_a_mock_without_a_vocabulary_is_refused(name: str) -> None:
    with pytest.raises((InvalidInputError, ModelNotFoundError)):
        MockModel(name)


class Recorder(MockModel):
    """Notes every batch; the first waits until ``release`` so that the others queue up behind it."""

    def __init__(self) -> None:
        super().__init__("300")
        self.batches: list[list[TokenSequence]] = []
        self.entered, self.release = threading.Event(), threading.Event()

    def score(self, work: Sequence[tuple[TokenSequence, LabelOptions]]) -> list[ScoredSequence]:
        self.batches.append([each for each, _ in work])
        self.entered.set()
        assert self.release.wait(30)
        return super().score(work)


async def scores(engine: BatchingEngine, sequences: Sequence[TokenSequence]) -> list[str]:
    scored = await asyncio.gather(*(engine.score(each, LabelOptions()) for each in sequences))
    return [each.id for each in scored]


def batches_of(sequences: list[TokenSequence]) -> list[list[TokenSequence]]:
    """The batches in which concurrent sequences are computed, after one that holds the engine meanwhile."""
    model = Recorder()
    engine = BatchingEngine(model)

    async def run() -> None:
        first = asyncio.ensure_future(scores(engine, [sequence([1, 2], name="first")]))
        await asyncio.to_thread(model.entered.wait, 30)
        others = asyncio.ensure_future(scores(engine, sequences))
        while len(engine._waiting) < len(sequences):
            await asyncio.sleep(0)
        model.release.set()
        assert await first == ["first"]
        assert await others == [each.id for each in sequences]

    asyncio.run(run())
    engine.close()
    assert sorted(each.id for batch in model.batches[1:] for each in batch) == sorted(each.id for each in sequences)
    return model.batches[1:]


def test_sequences_of_like_length_share_a_batch() -> None:
    lengths = [8, 400, 9, 380, 10, 390, 11, 30, 31, 370]
    batches = batches_of([sequence([1] * length, name=str(length)) for length in lengths])
    for batch in batches:
        real = sum(len(each.token_ids) for each in batch)
        assert real >= 0.75 * len(batch) * max(len(each.token_ids) for each in batch)
    assert len(batches) <= 4


def test_batches_stay_within_their_bounds() -> None:
    batches = batches_of([sequence([1] * 1500, name=str(index)) for index in range(5)])
    assert [len(batch) for batch in batches] == [2, 2, 1]
    batches = batches_of([sequence([1] * 5000, name="beyond the bound")])
    assert [len(batch) for batch in batches] == [1]


def test_whoever_has_waited_longest_leads_the_next_batch() -> None:
    many = [sequence([1] * 500, name=f"many{index}") for index in range(40)]
    odd = [sequence([1] * 20, name=f"odd{index}") for index in range(2)]
    batches = batches_of([many[0], odd[0], *many[1:], odd[1]])
    turns = [index for index, batch in enumerate(batches) if any(each.id.startswith("odd") for each in batch)]
    assert turns == [1]
    assert [len(batch) for batch in batches] == [8, 2, 8, 8, 8, 8]


def test_what_is_cancelled_before_its_turn_is_not_computed() -> None:
    model = Recorder()
    engine = BatchingEngine(model)

    async def run() -> None:
        first = asyncio.ensure_future(scores(engine, [sequence([1, 2], name="first")]))
        await asyncio.to_thread(model.entered.wait, 30)
        dropped = asyncio.ensure_future(scores(engine, [sequence([1] * 9, name=str(index)) for index in range(99)]))
        while len(engine._waiting) < 99:
            await asyncio.sleep(0)
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        while engine._waiting:
            await asyncio.sleep(0)
        model.release.set()
        assert await first == ["first"]
        assert await scores(engine, [sequence([1, 2], name="next")]) == ["next"]

    asyncio.run(run())
    engine.close()
    assert [len(batch) for batch in model.batches] == [1, 1]


def test_a_cancelled_decode_ends_at_its_next_step(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    reached, cancelled = threading.Event(), threading.Event()

    def count(engine: BatchingEngine) -> None:
        steps.append(1)
        if len(steps) == 3:
            reached.set()
            assert cancelled.wait(30)

    monkeypatch.setattr(BatchingEngine, "_score_one_batch", count)
    engine = BatchingEngine(TransformersModel(model_of("llama-untied")))

    async def run() -> None:
        prompts = [Prompt(id=str(index), token_ids=[5 + index]) for index in range(4)]
        # No token can stop these before 250.
        options = DecodeOptions(max_new_tokens=250, stop_token_ids=(engine.describe().vocab_size,))
        decode = asyncio.gather(*(engine.generate(prompt, options) for prompt in prompts))
        await asyncio.to_thread(reached.wait, 30)
        decode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decode
        cancelled.set()
        assert await scores(engine, [sequence([1, 2])]) == ["x"]

    asyncio.run(run())
    engine.close()
    assert len(steps) == 3


def test_a_sequence_that_fails_does_not_fail_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = MockModel.score

    def fail_on_13(model: MockModel, work: Any) -> Any:
        if any(13 in each.token_ids for each, _ in work):
            raise RuntimeError("device lost")
        return compute(model, work)

    monkeypatch.setattr(MockModel, "score", fail_on_13)
    model = Recorder()
    engine = BatchingEngine(model)

    async def run() -> None:
        first = asyncio.ensure_future(scores(engine, [sequence([1, 2], name="first")]))
        await asyncio.to_thread(model.entered.wait, 30)
        work = [
            engine.score(sequence([13 if index == 3 else 1, 2], name=str(index)), LabelOptions()) for index in range(8)
        ]
        others = asyncio.ensure_future(asyncio.gather(*work, return_exceptions=True))
        while len(engine._waiting) < 8:
            await asyncio.sleep(0)
        model.release.set()
        await first
        found = await others
        assert [str(each) if isinstance(each, Exception) else each.id for each in found] == [
            *"012",
            "device lost",
            *"4567",
        ]
        assert await scores(engine, [sequence([1, 2])]) == ["x"]

    asyncio.run(run())
    engine.close()


def test_a_decode_that_fails_midway_goes_on_for_those_who_can(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt(id=str(index), token_ids=[5 + index]) for index in range(4)]
    options = DecodeOptions(max_new_tokens=20, stop_token_ids=(299,))
    model = MockModel("300")
    decode = MockModel.generate

    def fail_on_7(mock: MockModel, work: Any, how: Any, watch: Any) -> None:
        steps = []
        step = watch.after_step

        def after_step() -> None:
            steps.append(1)
            if len(steps) == 9 and any(7 in each.token_ids for each in work):
                raise RuntimeError("device lost")
            step()

        watch.after_step = after_step
        decode(mock, work, how, watch)

    async def run() -> tuple[list[Any], list[Any]]:
        engine = BatchingEngine(model)
        expected = await asyncio.gather(*(engine.generate(each, options) for each in prompts))
        monkeypatch.setattr(MockModel, "generate", fail_on_7)
        found = await asyncio.gather(*(engine.generate(each, options) for each in prompts), return_exceptions=True)
        engine.close()
        return expected, found

    expected, found = asyncio.run(run())
    assert [str(found[2])] == ["device lost"]
    assert [*found[:2], found[3]] == [*expected[:2], expected[3]]


def test_a_closed_engine_ends_what_is_under_way() -> None:
    model = Recorder()
    engine = BatchingEngine(model)

    async def run() -> None:
        work = [asyncio.ensure_future(engine.score(sequence([1, 2]), LabelOptions())) for _ in range(3)]
        await asyncio.to_thread(model.entered.wait, 30)
        engine.close()
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            assert isinstance(outcome, TeacherUnavailableError)
        model.release.set()
        with pytest.raises(TeacherUnavailableError, match="stopping"):
            await engine.score(sequence([1, 2]), LabelOptions())

    asyncio.run(run())
