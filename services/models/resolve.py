"""From the name of a model to files that transformers loads, the same bytes in every process of a machine."""

from pathlib import Path

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.models.hub import fetch_model
from services.models.smollm2 import SMOLLM2_NAMES, smollm2_directory

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve_model(name: str, *, revision: str | None = None, settings: Settings) -> str:
    """The directory that holds the model, as an absolute path for ``from_pretrained``.

    ``name`` is a local directory, SmolLM2-135M-Instruct by its hub id or as ``smollm2-135m-instruct`` (which needs no
    hub), or any hub id. ModelNotFoundError says what is missing and what to do.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return str(_check_directory(directory.absolute(), revision=revision))
    if _is_path(name):
        raise ModelNotFoundError(
            f"there is no model directory {name}", fix="Check the path; a hub id has the form owner/name."
        )
    if revision is None and name.lower() in SMOLLM2_NAMES:
        return str(smollm2_directory(settings))
    snapshot = fetch_model(SMOLLM2_NAMES.get(name.lower(), name), revision=revision, settings=settings)
    return str(_check_directory(snapshot, revision=None))


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _check_directory(directory: Path, *, revision: str | None) -> Path:
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
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        missing.append("weights (*.safetensors)")
    if not any((directory / file).is_file() for file in TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise ModelNotFoundError(
            f"{directory} is not a model: it lacks {', '.join(missing)}",
            fix="Name a directory that save_pretrained wrote for both model and tokenizer.",
        )
    return directory
