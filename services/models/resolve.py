"""From the name of a model to files that transformers loads, the same bytes in every process of a machine."""

from pathlib import Path

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.models.directory import check_model_directory, is_path
from services.models.gemma3 import NAME as GEMMA3
from services.models.gemma3 import gemma3_directory
from services.models.hub import fetch_model
from services.models.minilm import NAME as MINILM
from services.models.minilm import encoder_directory
from services.models.smollm2 import SMOLLM2_NAMES, smollm2_directory


def resolve_model(name: str, *, revision: str | None = None, settings: Settings) -> str:
    """The directory that holds the model, as an absolute path for ``from_pretrained``.

    ``name`` is a local directory, SmolLM2-135M-Instruct by its hub id or as ``smollm2-135m-instruct`` (which needs no
    hub), the sentence encoder ``all-minilm-l6-v2`` and ``gemma3-270m`` (which need none either), or any hub id.
    ModelNotFoundError says what is missing and what to do.
    """
    found = _without_hub(name, revision=revision, settings=settings)
    if found is not None:
        return found
    snapshot = fetch_model(SMOLLM2_NAMES.get(name.lower(), name), revision=revision, settings=settings)
    return str(check_model_directory(snapshot, revision=None))


def resolve_tokenizer(name: str, *, revision: str | None = None, settings: Settings) -> str:
    """The directory that holds the model's tokenizer; of a model on the hub, its weights are not fetched."""
    found = _without_hub(name, revision=revision, settings=settings)
    return found or str(fetch_model(name, revision=revision, settings=settings, weights=False))


def _without_hub(name: str, *, revision: str | None, settings: Settings) -> str | None:
    directory = Path(name).expanduser()
    if directory.is_dir():
        return str(check_model_directory(directory.absolute(), revision=revision))
    if is_path(name):
        raise ModelNotFoundError(
            f"there is no model directory {name}", fix="Check the path; a hub id has the form owner/name."
        )
    if revision is None and name.lower() in SMOLLM2_NAMES:
        return str(smollm2_directory(settings))
    if revision is None and name.lower() == MINILM:
        return str(encoder_directory(settings))
    if revision is None and name.lower() == GEMMA3:
        return str(gemma3_directory(settings))
    return None
