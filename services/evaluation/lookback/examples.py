"""A document and a summary as the tokens that a model reads, with the way back from tokens to characters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.contract.errors import InvalidInputError, UnsupportedError
from services.contract.prompt import PLAIN_PROMPT, SUMMARISE, encode_prompt, join_request
from services.evaluation.lookback.measure import Prompt

INSTRUCTION = SUMMARISE["xsum"]

Characters = tuple[int, int]
"""Characters [start, end) of a text."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One summary of one document. ``offsets`` holds the characters of each token of the summary."""

    prompt: Prompt
    answer: list[int]
    offsets: list[Characters]
    truncated: bool = False


def encode_example(
    tokenizer: Any, *, document: str, summary: str, window: int, instruction: str = INSTRUCTION
) -> Example:
    """The prompt that asks for a summary of ``document``, and ``summary`` as its answer.

    The context is everything up to the document's last token. A document that does not fit into the model's
    ``window`` beside the summary loses its end, and the example says ``truncated``. InvalidInputError for a summary
    without text or one that leaves no room for a document.
    """
    answer, offsets = encode_answer(tokenizer, summary)
    if not answer:
        raise InvalidInputError("the summary is empty", fix="Give a summary with text.")
    if not document.strip():
        raise InvalidInputError("the document is empty", fix="Give the text that the summary is about.")
    text = document
    while True:
        prompt = encode_document(tokenizer, document=text, instruction=instruction)
        excess = len(prompt.ids) + len(answer) - window
        if excess <= 0:
            return Example(prompt=prompt, answer=answer, offsets=offsets, truncated=text is not document)
        text = _shorten(tokenizer, text, tokens=excess)
        if not text:
            raise InvalidInputError(
                f"the summary has {len(answer)} tokens, which leaves no room for the document in the model's {window}",
                fix="Shorten the summary, or use a model with a longer window.",
            )


def encode_document(tokenizer: Any, *, document: str, instruction: str = INSTRUCTION) -> Prompt:
    """The prompt for a summary of ``document``, the same tokens as everywhere in the platform."""
    if not tokenizer.is_fast:
        raise UnsupportedError(
            "the model's tokenizer cannot say which characters a token stands for",
            fix="Use a model with a fast tokenizer (tokenizer.json).",
        )
    request = join_request(instruction, document)
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], add_generation_prompt=True, tokenize=False
        )
    else:
        text = PLAIN_PROMPT.format(request=request)
    encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    start = text.rfind(document.strip())
    if start < 0 or ids != encode_prompt(tokenizer, instruction=instruction, context=document):
        raise UnsupportedError(
            "the model's chat template changes the document's text", fix="Use a model whose template keeps it as it is."
        )
    end = start + len(document.strip())
    last = max(index for index, (first, after) in enumerate(encoded["offset_mapping"]) if first < after and first < end)
    return Prompt(ids=ids, context_tokens=last + 1)


def encode_answer(tokenizer: Any, text: str) -> tuple[list[int], list[Characters]]:
    """Token ids of a text as an answer, without an end token, and each token's characters in ``text``."""
    stripped = text.strip()
    encoded = tokenizer(stripped, add_special_tokens=False, return_offsets_mapping=True)
    shift = len(text) - len(text.lstrip())
    offsets = [(start + shift, end + shift) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), [_trim(text, characters) for characters in offsets]


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Characters]]:
    """The text of generated tokens and each token's characters in it.

    A model may spell a text with other tokens than the tokenizer would, so characters are found by decoding ever
    longer beginnings; tokens that share one character all stand for it.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    offsets: list[Characters] = []
    before = 0
    for count in range(1, len(ids) + 1):
        beginning = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        whole = len(beginning.rstrip("\ufffd")) if count < len(ids) else len(text)
        end = whole if whole == len(beginning) else min(whole + 1, len(text))
        offsets.append(_trim(text, (min(before, end), end)))
        before = max(before, whole)
    return text, offsets


def _trim(text: str, characters: Characters) -> Characters:
    """Without the white space that some tokenizers count to the token after it."""
    start, end = characters
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _shorten(tokenizer: Any, text: str, *, tokens: int) -> str:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    kept = len(offsets) - tokens
    return text[: offsets[kept - 1][1]].rstrip() if kept > 0 else ""
