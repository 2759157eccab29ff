"""The teacher's tokenizer, as far as a server needs it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contract.errors import HandshakeError, MissingExtraError, ModelNotFoundError

_ROLES = ("bos", "eos", "unk", "pad")
_COMPARED_TEXT = "14 ferries, don't;  two  blanks\n\tdef f(x): return x ** 2  今日は。 naïve 👍🏽 <|im_start|></s>"


@dataclass(frozen=True, kw_only=True)
class TeacherTokenizer:
    """``vocab`` maps token to id; ``encode`` gives ids without special tokens around them."""

    vocab: Mapping[str, int]
    special_token_ids: Mapping[str, int]
    encode: Callable[[str], list[int]]

    @property
    def vocab_size(self) -> int:
        """Highest id plus 1."""
        return max(self.vocab.values()) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 over vocabulary and special tokens, 32 hex digits."""
        content = json.dumps([sorted(self.vocab.items()), sorted(self.special_token_ids.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> TeacherTokenizer:
    """The tokenizer of a model's directory, as transformers reads it; code of its own runs only where it is trusted."""
    from transformers import AutoTokenizer

    return from_transformers(AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code))


def from_transformers(tokenizer: Any) -> TeacherTokenizer:
    """Around a transformers tokenizer."""
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    return TeacherTokenizer(
        vocab=tokenizer.get_vocab(),
        special_token_ids={role: token_id for role, token_id in ids.items() if token_id is not None},
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
    )


def from_directory(directory: Path) -> TeacherTokenizer:
    """From tokenizer.json and tokenizer_config.json, without transformers or torch."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtraError(
            "the package tokenizers is not installed", fix="Run pip install 'smoothkd[teacher]'."
        ) from None
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ModelNotFoundError(
            f"{directory} holds no tokenizer.json",
            fix="Name a directory with a tokenizer, or a vocabulary size such as 512.",
        )
    tokenizer = Tokenizer.from_file(str(file))
    return TeacherTokenizer(
        vocab=tokenizer.get_vocab(with_added_tokens=True),
        special_token_ids=_special_token_ids(directory / "tokenizer_config.json", tokenizer.token_to_id),
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
    )


def bytes_tokenizer(vocab_size: int) -> TeacherTokenizer:
    """A vocabulary without a tokenizer: token i is byte i, and what lies beyond 255 has no text."""
    return TeacherTokenizer(
        vocab={f"token-{token_id}": token_id for token_id in range(vocab_size)},
        special_token_ids={"eos": vocab_size - 1},
        encode=lambda text: [byte % vocab_size for byte in text.encode()],
    )


def require_same_tokenizer(found: TeacherTokenizer, wanted: TeacherTokenizer, *, name: str) -> None:
    """HandshakeError unless the tokenizer of the model ``name`` reads text as ``wanted`` does and ends it alike."""
    differences = []
    if found.vocab != wanted.vocab:
        differences.append(f"{len(found.vocab)} tokens against {len(wanted.vocab)}, or other ids for them")
    for role in ("bos", "eos"):
        ids = found.special_token_ids.get(role), wanted.special_token_ids.get(role)
        if ids[0] != ids[1]:
            differences.append(f"the {role} token is {ids[0]} instead of {ids[1]}")
    if found.encode(_COMPARED_TEXT) != wanted.encode(_COMPARED_TEXT):
        differences.append("the same text becomes other ids")
    if differences:
        raise HandshakeError(
            f"the tokenizer of {name} is not the teacher's: {'; '.join(differences)}",
            fix="Save the model with the tokenizer that it came with, or start a teacher of its own with --model.",
        )


def stop_token_ids(directory: Path, eos: int | None) -> tuple[int, ...]:
    """Ids that end a continuation: those of generation_config.json, else config.json, and the tokenizer's own."""
    configured = None
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if configured is None and file.is_file():
            configured = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return tuple(sorted({*ids, *([] if eos is None else [eos])}))


def _special_token_ids(config_file: Path, token_to_id: Callable[[str], int | None]) -> dict[str, int]:
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    ids = {}
    for role in _ROLES:
        token = config.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        token_id = token_to_id(content) if isinstance(content, str) else None
        if token_id is not None:
            ids[role] = token_id
    return ids
