"""How an instruction becomes prompt tokens, the same for training, teacher decoding and evaluation."""

from collections.abc import Mapping
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that prompts need."""

    chat_template: Any
    eos_token_id: int | None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...


PLAIN_PROMPT = "### Instruction:\n{request}\n\n### Response:\n"
"""Used where the tokenizer has no chat template."""

SUMMARISE = {
    "demo_news": "Summarize the following article in two sentences.",
    "cnn_dailymail": "Summarize the following article in three sentences.",
    "xsum": "Summarize the following article in one sentence.",
}


def join_request(instruction: str, context: str = "") -> str:
    """The user's words: the instruction, then the context it is about."""
    return f"{instruction.strip()}\n\n{context.strip()}" if context.strip() else instruction.strip()


def encode_prompt(tokenizer: Tokenizer, *, instruction: str, context: str = "") -> list[int]:
    """Token ids up to where the response starts: the tokenizer's chat template, or PLAIN_PROMPT without one."""
    request = join_request(instruction, context)
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(ids)
    return tokenizer.encode(PLAIN_PROMPT.format(request=request))


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """Token ids of the response and the end-of-sequence token that closes it."""
    ids = tokenizer.encode(response.strip(), add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids


def encode_record(tokenizer: Tokenizer, record: Mapping[str, str]) -> tuple[list[int], list[int]]:
    """Prompt ids and response ids of a record with Dolly's columns."""
    prompt = encode_prompt(tokenizer, instruction=record["instruction"], context=record.get("context") or "")
    return prompt, encode_response(tokenizer, record["response"])
