"""Ratios of every way of measuring, against the attention matrices that eager attention returns."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from services.contract.errors import UnsupportedError
from services.evaluation.lookback import attention
from services.evaluation.lookback.attention import LookbackRecorder, recording
from services.evaluation.lookback.measure import (
    Prompt,
    generate_measured,
    measure_answers,
    measure_packed,
    measure_padded,
)
from tests.evaluation.lookback.models import eager_ratios, make_decoder
from tests.largest_tensor import LargestTensor

ARCHITECTURES = ["llama", "qwen2", "mistral", "gemma2"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_decoder(request.param)


def tokens(length: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (length,), generator=generator).tolist()


def pairs() -> list[tuple[Prompt, list[int]]]:
    """Prompts longer and shorter than the sliding windows, with and without a cue between context and answer."""
    return [
        (Prompt(ids=tokens(17, seed=0), context_tokens=13), tokens(9, seed=1)),
        (Prompt(ids=tokens(4, seed=2), context_tokens=2), tokens(3, seed=3)),
        (Prompt(ids=tokens(9, seed=4), context_tokens=8), tokens(12, seed=5)),
    ]


def test_the_sliding_window_hides_part_of_the_context() -> None:
    ratios = eager_ratios(make_decoder("mistral"), *pairs()[0])
    assert (ratios[0] > 0).all()
    assert (ratios[-1] == 0).all()


def test_several_answers_to_one_prompt(decoder: PreTrainedModel) -> None:
    prompt = pairs()[0][0]
    answers = [tokens(length, seed=length) for length in (9, 1, 14)]
    measured = measure_answers(decoder, prompt, answers, batch_size=2)
    for answer, ratios in zip(answers, measured, strict=True):
        torch.testing.assert_close(ratios, eager_ratios(decoder, prompt, answer), atol=1e-5, rtol=0)


def test_a_left_padded_batch(decoder: PreTrainedModel) -> None:
    for (prompt, answer), ratios in zip(pairs(), measure_padded(decoder, pairs()), strict=True):
        torch.testing.assert_close(ratios, eager_ratios(decoder, prompt, answer), atol=1e-5, rtol=0)


def test_a_packed_row(decoder: PreTrainedModel) -> None:
    for (prompt, answer), ratios in zip(pairs(), measure_packed(decoder, pairs()), strict=True):
        torch.testing.assert_close(ratios, eager_ratios(decoder, prompt, answer), atol=1e-5, rtol=0)


def test_while_generating_from_a_left_padded_batch(decoder: PreTrainedModel) -> None:
    prompts = [prompt for prompt, _ in pairs()]
    answers = generate_measured(decoder, prompts, max_new_tokens=11, pad_id=0, end_ids=[])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.ids) == 11
        torch.testing.assert_close(answer.ratios_TLH, eager_ratios(decoder, prompt, answer.ids), atol=1e-5, rtol=0)


def test_measuring_leaves_the_generated_text_as_it_is() -> None:
    model, prompt = make_decoder("llama"), pairs()[0][0]
    plain = model.generate(torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    [answer] = generate_measured(model, [prompt], max_new_tokens=12, pad_id=0, end_ids=[])
    assert answer.ids == plain[0, len(prompt.ids) :].tolist()
    assert model.config._attn_implementation == "sdpa"


def test_an_answer_ends_before_its_end_token() -> None:
    model = make_decoder("llama")
    prompts = [prompt for prompt, _ in pairs()]
    whole = generate_measured(model, prompts, max_new_tokens=12, pad_id=0, end_ids=[])
    end = whole[0].ids[4]
    cut = generate_measured(model, prompts, max_new_tokens=12, pad_id=0, end_ids=[end])
    expected = whole[0].ids[: whole[0].ids.index(end)]
    assert cut[0].ids == expected
    torch.testing.assert_close(cut[0].ratios_TLH, whole[0].ratios_TLH[: len(expected)], atol=1e-5, rtol=0)


def test_without_any_token_after_the_context_the_first_ratio_is_one() -> None:
    prompt = Prompt(ids=tokens(8, seed=6), context_tokens=8)
    [ratios] = measure_answers(make_decoder("llama"), prompt, [tokens(3, seed=7)])
    assert (ratios[0] == 1).all()
    assert (ratios[1:] < 1).all()


def test_a_few_queries_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_decoder("gemma2")
    whole = measure_padded(model, pairs())
    monkeypatch.setattr(attention, "WEIGHTS_AT_A_TIME", 400)
    for few, many in zip(measure_padded(model, pairs()), whole, strict=True):
        torch.testing.assert_close(few, many)


def test_memory_grows_linearly_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WEIGHTS_AT_A_TIME", 1)
    model = make_decoder("llama")
    largest = []
    for length in (400, 1600):
        with LargestTensor() as made:
            measure_answers(model, Prompt(ids=tokens(length, seed=8), context_tokens=length - 3), [tokens(10, seed=9)])
        largest.append(made.elements)
    assert largest[1] <= 4.2 * largest[0]


def test_attention_with_sinks_is_refused() -> None:
    model = make_decoder("llama")
    recorder = LookbackRecorder(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="s_aux"), recording(model, recorder):
        model(torch.tensor([[5, 6, 7, 8]]), s_aux=torch.zeros(4))
    assert model.config._attn_implementation == "sdpa"


def test_learned_positions_count_without_the_padding() -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).eval()
    for (prompt, answer), ratios in zip(pairs(), measure_padded(model, pairs()), strict=True):
        torch.testing.assert_close(ratios, eager_ratios(model, prompt, answer), atol=1e-5, rtol=0)


def test_steps_are_kept_in_room_made_ahead() -> None:
    draws = torch.Generator().manual_seed(3)
    recorder = LookbackRecorder(torch.ones(2, 900, dtype=torch.bool))
    steps = [torch.rand(2, 3, queries, 2, generator=draws) for queries in (5, *[1] * 700)]
    storages = set()
    for step in steps:
        recorder.add(0, step)
        storages.add(recorder._masses[0].data_ptr())
    torch.testing.assert_close(recorder.collect(), torch.cat(steps, dim=2).permute(0, 2, 1, 3)[:, :, None])
    # One small tensor per step would break up the memory that the key-value cache gives back.
    assert len(storages) <= 4
