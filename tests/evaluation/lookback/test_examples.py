"""Tokens and characters: prompts as the platform makes them, offsets, long documents."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from services.contract.errors import InvalidInputError
from services.contract.prompt import PLAIN_PROMPT, encode_prompt
from services.evaluation.lookback.examples import INSTRUCTION, decode_answer, encode_answer, encode_example

DOCUMENT = "The harbour master of Ostrel said that 14 ferries had been repaired."


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_the_context_ends_with_the_document(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_example(tokenizer, document=DOCUMENT, summary="14 ferries are repaired.", window=512)
    assert example.prompt.ids == encode_prompt(tokenizer, instruction=INSTRUCTION, context=DOCUMENT)
    assert tokenizer.decode(example.prompt.ids[: example.prompt.context_tokens]).endswith("had been repaired.")
    cue = tokenizer.decode(example.prompt.ids[example.prompt.context_tokens :])
    assert cue == "<|im_end|>\n<|im_start|>assistant\n"


def test_the_context_ends_with_the_document_without_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    prompt = encode_example(tokenizer, document=f" {DOCUMENT}\n", summary="Fine.", window=512).prompt
    assert tokenizer.decode(prompt.ids[prompt.context_tokens :]) == PLAIN_PROMPT.split("{request}")[1]


def test_a_document_that_does_not_fit_loses_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_example(tokenizer, document=DOCUMENT, summary="14 ferries.", window=512)
    window = len(whole.prompt.ids) + len(whole.answer) - 7
    cut = encode_example(tokenizer, document=DOCUMENT, summary="14 ferries.", window=window)
    assert cut.truncated
    assert not whole.truncated
    assert window - 3 <= len(cut.prompt.ids) + len(cut.answer) <= window
    context = tokenizer.decode(cut.prompt.ids[: cut.prompt.context_tokens])
    assert context.split("\n\n")[1] == DOCUMENT[: len(context.split("\n\n")[1])]


@pytest.mark.parametrize(
    ("document", "summary", "what"),
    [
        (DOCUMENT, " \n", "the summary is empty"),
        (" ", "Text.", "the document is empty"),
        (DOCUMENT, "a b c d " * 30, "leaves no room"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tokenizer: PreTrainedTokenizerFast, document: str, summary: str, what: str
) -> None:
    with pytest.raises(InvalidInputError, match=what):
        encode_example(tokenizer, document=document, summary=summary, window=110)


@pytest.mark.parametrize("text", ["The harbour, 14 ferries.", "  Zürich – “naïve” 😀 漢字!\n", "a"])
def test_offsets_find_each_token_in_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids, offsets = encode_answer(tokenizer, text)
    assert len(ids) == len(offsets)
    assert all(text[start:end] == text[start:end].strip() for start, end in offsets)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == {place for place, character in enumerate(text) if not character.isspace()}
    decoded, generated = decode_answer(tokenizer, ids)
    assert decoded == text.strip()
    shift = len(text) - len(text.lstrip())
    assert [(start + shift, end + shift) for start, end in generated] == offsets


def test_offsets_of_tokens_that_the_tokenizer_would_not_choose(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [tokenizer.encode(letter)[0] for letter in "harbour"]
    assert len(ids) > len(tokenizer.encode("harbour"))
    assert decode_answer(tokenizer, ids) == ("harbour", [(place, place + 1) for place in range(7)])
