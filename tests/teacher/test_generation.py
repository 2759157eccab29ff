"""Decoding through the server against transformers' own generate on each prompt alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.contract.errors import LimitExceededError
from services.contract.lm_head import LmHead
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher

PROMPTS = [
    Prompt(id=f"p{index}", token_ids=[3 + index * 5 + place for place in range(3 + 2 * index)]) for index in range(6)
]


def generated(
    client: TeacherClient, options: DecodeOptions, prompts: list[Prompt] = PROMPTS
) -> dict[str, Continuation]:
    continuations = list(client.generate(prompts, options))
    assert Counter(each.id for each in continuations) == Counter(prompt.id for prompt in prompts)
    return {each.id: each for each in continuations}


@pytest.mark.parametrize("name", ["llama-untied", "gemma2-soft-cap", "gpt2-tied"])
def test_greedy_decoding_is_what_transformers_decodes(name: str, model_of: Callable[[str], Path]) -> None:
    directory = model_of(name)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with (
        running_teacher(TeacherOptions(model=str(directory), engine="transformers", port=0)) as address,
        TeacherClient(address) as client,
    ):
        found = generated(client, DecodeOptions(max_new_tokens=24))
    for prompt in PROMPTS:
        ids = torch.tensor([prompt.token_ids])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        expected = tuple(whole[0, len(prompt.token_ids) :].tolist())
        assert found[prompt.id].token_ids == expected
        stopped = expected[-1] == model.config.eos_token_id
        assert found[prompt.id].finish_reason == ("stop" if stopped else "length")


def test_stop_tokens_end_a_continuation_and_stand_last(tiny_teacher: TeacherClient) -> None:
    free = generated(tiny_teacher, DecodeOptions(max_new_tokens=20))
    stop = free["p2"].token_ids[4]
    ended = generated(tiny_teacher, DecodeOptions(max_new_tokens=20, stop_token_ids=(stop,)))
    for prompt in PROMPTS:
        ids = free[prompt.id].token_ids
        if stop in ids:
            expected = ids[: ids.index(stop) + 1]
            assert (ended[prompt.id].token_ids, ended[prompt.id].finish_reason) == (expected, "stop")
        else:
            # Its own end-of-sequence tokens no longer count.
            assert ended[prompt.id].token_ids[: len(ids)] == ids
    assert len(ended["p2"].token_ids) <= 5


def test_padding_rows_are_never_written(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    directory = tmp_path / "model"
    shutil.copytree(model_of("llama-padded"), directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    vocab_size = model.config.vocab_size - 37
    with torch.no_grad():
        # Rows that no token id reaches, made by far the likeliest.
        model.lm_head.weight[vocab_size:] *= 50
    model.save_pretrained(directory)
    with (
        running_teacher(TeacherOptions(model=str(directory), engine="transformers", port=0)) as address,
        TeacherClient(address) as client,
    ):
        for temperature in (0.0, 1.0):
            for each in generated(client, DecodeOptions(max_new_tokens=20, temperature=temperature)).values():
                assert max(each.token_ids) < vocab_size


def test_sampling_repeats_with_the_seed_and_ignores_the_company(tiny_teacher: TeacherClient) -> None:
    options = DecodeOptions(max_new_tokens=16, temperature=1.3, seed=5)
    together = generated(tiny_teacher, options)
    assert generated(tiny_teacher, options) == together
    for prompt in PROMPTS:
        assert generated(tiny_teacher, options, [prompt])[prompt.id] == together[prompt.id]
    assert generated(tiny_teacher, DecodeOptions(max_new_tokens=16, temperature=1.3, seed=6)) != together


@pytest.mark.parametrize("teacher", ["tiny_teacher", "mock_teacher"])
def test_samples_follow_the_teachers_distribution(teacher: str, request: pytest.FixtureRequest) -> None:
    assert_samples_follow_the_distribution(request.getfixturevalue(teacher), temperature=0.7)


def assert_samples_follow_the_distribution(client: TeacherClient, *, temperature: float) -> None:
    """One token drawn 3,000 times after the same few, against the labels there."""
    ids = [5, 17, 40]
    draws = 3000
    prompts = [Prompt(id=str(index), token_ids=ids) for index in range(draws)]
    options = DecodeOptions(max_new_tokens=1, temperature=temperature)
    parts = [prompts[start : start + 1000] for start in range(0, draws, 1000)]
    counts = Counter(each.token_ids[0] for part in parts for each in client.generate(part, options))
    sequence = TokenSequence(id="x", token_ids=[*ids, 0], label_positions=[3])
    (labels,) = client.score([sequence], LabelOptions(encoding="top_k", k=1024, temperature=temperature))
    expected = draws * np.exp(labels.labels.logprobs_NK[0].astype(np.float64))
    likely = expected >= 20
    observed = np.array([counts[token] for token in labels.labels.ids_NK[0]])
    assert likely.sum() >= 5
    chi_square = (((observed - expected) ** 2 / expected)[likely]).sum()
    # Mean is the number of tokens, deviation the root of twice that; five deviations is one run in two million.
    assert chi_square < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_the_mock_teacher_writes_what_it_holds_likeliest(mock_teacher: TeacherClient) -> None:
    head: LmHead = mock_teacher.fetch_lm_head()
    for prompt in PROMPTS[:2]:
        (found,) = mock_teacher.generate([prompt], DecodeOptions(max_new_tokens=8))
        ids = [*prompt.token_ids, *found.token_ids]
        positions = list(range(len(prompt.token_ids), len(ids)))
        (labels,) = mock_teacher.score([TokenSequence(id="x", token_ids=ids, label_positions=positions)])
        assert tuple(head.logits(labels.labels.hidden_ND).argmax(axis=1)) == found.token_ids


def test_a_prompt_that_leaves_no_room_is_refused(tiny_teacher: TeacherClient) -> None:
    with pytest.raises(LimitExceededError, match="'p0' has 3 tokens; with 254 new ones"):
        generated(tiny_teacher, DecodeOptions(max_new_tokens=254))
