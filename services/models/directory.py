"""What a model's directory must hold. Light: it needs neither torch nor a hub library."""

import json
import os
from pathlib import Path

from services.contract.errors import ModelNotFoundError, UnsupportedError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def is_path(name: str) -> bool:
    """Whether a model's name can only mean a directory, for a hub id has the form owner/name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def same_directory(one: str | Path, other: str | Path) -> bool:
    """Whether both lead to one directory; names that no file system takes lead nowhere."""
    first, second = (os.path.expanduser(path) for path in (one, other))
    return os.path.isdir(first) and os.path.isdir(second) and os.path.samefile(first, second)


def check_model_directory(directory: Path, *, revision: str | None) -> Path:
    """``directory``, which holds a whole model; ModelNotFoundError says what it lacks.

    UnsupportedError for weights that are only there as a pickle.
    """
    if revision is not None:
        raise ModelNotFoundError(
            f"{directory} is a local directory, which has no revision {revision}",
            fix="Remove the revision, or name the model by its hub id.",
        )
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            f"{directory} holds a LoRA adapter, not a whole model", fix="Merge it into its base model first."
        )
    missing = []
    if not (directory / "config.json").is_file():
        missing.append("config.json")
    if not any(directory.glob("*.safetensors")):
        if any(directory.glob("pytorch_model*.bin")):
            raise no_safetensors(str(directory))
        missing.append("weights (*.safetensors)")
    if not any((directory / file).is_file() for file in TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise ModelNotFoundError(
            f"{directory} is not a model: it lacks {', '.join(missing)}",
            fix="Name a directory that save_pretrained wrote for both model and tokenizer.",
        )
    _check_configuration(directory / "config.json")
    return directory


def _check_configuration(file: Path) -> None:
    try:
        whole = isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise ModelNotFoundError(
            f"{file} cannot be read as a JSON object", fix="Copy the model again, or name another directory."
        )


def no_safetensors(name: str) -> UnsupportedError:
    """The error for a model whose weights are only there in a format that is a program, and may be anybody's."""
    return UnsupportedError(
        f"{name} has no weights as safetensors, and pickles (pytorch_model.bin) are not read: loading one may run code",
        fix="Many models on the hub have a copy under the revision refs/pr/1 or another. Or convert weights that you "
        'trust: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        "[x.from_pretrained('MODEL').save_pretrained('DIRECTORY') for x in (M, T)]\", and name that directory.",
    )
