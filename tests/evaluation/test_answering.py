"""Greedy batched answers: the same as one by one, whatever the padding, within the model's window."""

import bisect
import functools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import InvalidInputError, ModelNotFoundError
from services.contract.prompt import encode_prompt
from services.evaluation import answering
from services.evaluation.answering import Request, answer, encode_requests
from services.evaluation.model import LoadedModel, load_model

INSTRUCTION = "Summarize the following article in two sentences."


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model))


@pytest.mark.parametrize("pad", ["its own", "none"])
def test_batches_of_any_size_give_the_outputs_of_plain_argmax(tiny_model: Path, tmp_path: Path, pad: str) -> None:
    directory = tiny_model if pad == "its own" else _without_pad_token(tiny_model, tmp_path)
    words = ["ferry ", "harbour 3 ", "said 10 ", "Tuesday. ", "Ostrel? "]
    items = [_item(str(count), word * count) for count, word in zip((3, 1, 9, 5, 2), words, strict=True)]
    expected = {item.item_id: _plain_greedy(tiny_model, item.source, tokens=24) for item in items}
    assert len(set(expected.values())) == 5
    for batch_size in (1, 2, 5):
        batches = list(
            _answers(
                items,
                loaded=load_model(str(directory)),
                max_new_tokens=24,
                batch_size=batch_size,
            )
        )
        assert [len(batch) for batch in batches] == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[batch_size]
        assert {item.item_id: output for batch in batches for item, output in batch} == expected
        assert next(iter(batches))[0][0].item_id == "9"


def test_long_prompts_share_batches_with_fewer_others(
    loaded: LoadedModel, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for four prompts of five words; the longest takes most of it."""
    monkeypatch.setattr(answering, "TOKENS_PER_PROMPT", _prompt_length(tiny_model, "ferry " * 5))
    items = [_item(str(count), "ferry " * count) for count in (1, 2, 60, 3, 4, 5)]
    batches = list(_answers(items, loaded=loaded, max_new_tokens=4, batch_size=4))
    assert [[item.item_id for item, _ in batch] for batch in batches] == [["60"], ["5", "4", "3", "2"], ["1"]]
    for item, output in (answered for batch in batches for answered in batch):
        assert output == _plain_greedy(tiny_model, item.source, tokens=4)


def test_an_output_ends_where_the_model_ends_it(tiny_model: Path, tmp_path: Path) -> None:
    """With the token that greedy decoding gives fourth declared to be an end, three are left."""
    item = _item("a", "ferry")
    whole = _plain_ids(tiny_model, item.source, tokens=8)
    ending = shutil.copytree(tiny_model, tmp_path / "ending")
    config = json.loads((ending / "generation_config.json").read_text())
    end = next(index for index in range(2, 8) if whole[index] not in whole[:index])
    config["eos_token_id"] = [config["eos_token_id"], whole[end]]
    (ending / "generation_config.json").write_text(json.dumps(config))
    # Beside a longer one, so that the shorter is padded behind its end.
    items = [item, _item("b", "harbour master " * 7)]
    batches = _answers(items, loaded=load_model(str(ending)), max_new_tokens=8, batch_size=2)
    outputs = {done.item_id: output for batch in batches for done, output in batch}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert outputs["a"] == tokenizer.decode(whole[:end], skip_special_tokens=True).strip()


def test_recommended_sampling_is_ignored(tiny_model: Path, tmp_path: Path) -> None:
    sampling = shutil.copytree(tiny_model, tmp_path / "sampling")
    config = json.loads((sampling / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "repetition_penalty": 9.0}
    (sampling / "generation_config.json").write_text(json.dumps(config))
    (batch,) = _answers(
        [_item("a", "ferry")],
        loaded=load_model(str(sampling)),
        max_new_tokens=60,
        batch_size=1,
    )
    assert batch[0][1] == _plain_greedy(tiny_model, "ferry", tokens=60)


def test_articles_over_the_window_are_cut_and_counted(
    loaded: LoadedModel, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    article = "".join(f"No. {number} Ünïted. " for number in range(200))
    items = [_item("long", article), _item("short", "ferry"), _item("longer", article * 2)]
    with caplog.at_level(logging.WARNING):
        (batch,) = _answers(items, loaded=loaded, max_new_tokens=10, batch_size=3)
    outputs = {item.item_id: output for item, output in batch}
    assert "2 of 3 articles are longer than the model's window of 512 tokens" in caplog.text
    # Both were cut to the same beginning, which fills the window but for the output.
    assert outputs["long"] == outputs["longer"]
    fitting = bisect.bisect_right(range(len(article)), 502, key=lambda kept: _prompt_length(tiny_model, article[:kept]))
    assert outputs["long"] in {_plain_greedy(tiny_model, article[: fitting - back], tokens=10) for back in (1, 2, 3)}


def test_a_window_without_room_for_an_article_is_an_error(loaded: LoadedModel) -> None:
    with pytest.raises(InvalidInputError, match="leaves no room for an article"):
        list(_answers([_item("a", "ferry")], loaded=loaded, max_new_tokens=500, batch_size=1))


def test_a_model_that_cannot_be_loaded_is_named(tiny_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelNotFoundError, match="cannot be loaded as a language model"):
        load_model(str(broken))


def test_an_article_beside_others_is_summarised_by_the_real_model(smollm2: Path) -> None:
    items = [
        _item("a", "The ferry Larkspur ran aground at Ostrel on Tuesday. All 14 passengers were rescued."),
        _item("b", "Rain fell."),
    ]
    (batch,) = _answers(
        items,
        loaded=load_model(str(smollm2)),
        max_new_tokens=30,
        batch_size=2,
    )
    outputs = {item.item_id: output for item, output in batch}
    assert "Larkspur" in outputs["a"]
    assert "Ostrel" in outputs["a"]
    assert not any("<|" in output for output in outputs.values())


def _item(item_id: str, source: str) -> Request:
    return Request(item_id=item_id, instruction=INSTRUCTION, source=source, reference="A reference.")


def _answers(
    requests: list[Request], *, loaded: LoadedModel, max_new_tokens: int, batch_size: int, measure: bool = False
) -> list[list[tuple[Request, str]]]:
    prompts = encode_requests(requests, loaded=loaded, max_new_tokens=max_new_tokens)
    batches = answer(
        requests,
        prompts,
        loaded=loaded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        measure=measure,
    )
    return [[(one.request, one.output) for one in batch] for batch in batches]


def _without_pad_token(model: Path, tmp_path: Path) -> Path:
    directory = shutil.copytree(model, tmp_path / "no-pad")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).pad_token_id is None
    return directory


def _prompt_length(model: Path, source: str) -> int:
    return len(encode_prompt(_tokenizer(model), instruction=INSTRUCTION, context=source))


def _plain_greedy(model: Path, source: str, *, tokens: int) -> str:
    text: str = _tokenizer(model).decode(_plain_ids(model, source, tokens=tokens), skip_special_tokens=True)
    return text.strip()


@torch.inference_mode()
def _plain_ids(model: Path, source: str, *, tokens: int) -> list[int]:
    """One article alone, no padding, no cache, no generate()."""
    tokenizer = _tokenizer(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    ids = encode_prompt(tokenizer, instruction=INSTRUCTION, context=source)
    new: list[int] = []
    while len(new) < tokens:
        new.append(int(network(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            return new[:-1]
    return new


@functools.cache
def _tokenizer(model: Path):
    return AutoTokenizer.from_pretrained(model)
