"""Where a teacher's weights lie, and which may take their place while it serves.

Checked from files alone, so that what cannot be served is refused before anything is loaded.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.contract.errors import HandshakeError, InvalidInputError, ModelNotFoundError, UnsupportedError
from services.contract.settings import Settings
from services.models.directory import check_model_directory, is_path, same_directory
from services.models.resolve import resolve_model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SHAPE = (
    "model_type",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "quantization_config",
)
"""What in config.json two checkpoints must share for one to take the other's place."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A whole model's ``directory``, and for LoRA the ``adapter``'s; ``name`` is what students call the two.

    ``stamp``: size and time of every file, so that weights written over others are not taken for them.
    """

    name: str = field(compare=False)
    directory: Path
    adapter: Path | None = None
    revision: str = ""
    stamp: tuple[tuple[str, int, int], ...] = ()

    def is_called(self, name: str) -> bool:
        """Whether ``name`` is theirs, or another path to their directory."""
        return name == self.name or same_directory(name, self.adapter or self.directory)


def find_weights(name: str, *, base: str | None, revision: str | None, settings: Settings) -> Weights:
    """What a server starts with: a directory or hub id of a model, or a directory with a LoRA adapter.

    ``base`` names an adapter's model where its adapter_config.json does not say, or says wrongly.
    """
    directory = Path(name).expanduser()
    if is_adapter(directory):
        config = read_adapter(directory)
        model = base or str(config.get("base_model_name_or_path") or "")
        if not model:
            raise ModelNotFoundError(
                f"{directory / ADAPTER_CONFIG} names no base model", fix="Name it with --base MODEL."
            )
        resolved = Path(resolve_model(model, revision=revision, settings=settings))
        _require_decoder(resolved, name=model)
        return weights_at(name, directory=resolved, adapter=directory.absolute(), revision=revision or "")
    if base is not None:
        raise InvalidInputError(f"{name} is no LoRA adapter, so it has no base", fix="Leave --base out.")
    resolved = Path(resolve_model(name, revision=revision, settings=settings))
    _require_decoder(resolved, name=name)
    return weights_at(name, directory=resolved, revision=revision or "")


def find_replacement(name: str, *, start: Weights, roots: Sequence[Path], settings: Settings) -> Weights:
    """What a running server is asked to serve instead of ``start``: its own weights again where ``name`` means them.

    Otherwise a directory below one of ``roots``, with a checkpoint of the same architecture and shapes or with an
    adapter of the same base. ModelNotFoundError, UnsupportedError or HandshakeError says why not.
    """
    # A name that is relative lies below the first root, whatever directory the server was started in.
    directory = roots[0] / os.path.expanduser(name)
    if not name or start.is_called(name) or start.is_called(str(directory)):
        return weights_at(start.name, directory=start.directory, adapter=start.adapter, revision=start.revision)
    # Unlike Path.is_dir it takes any name, also one that no file system does.
    if not os.path.isdir(directory):
        where = "a directory" if is_path(name) else "the model it was started with or a directory"
        raise ModelNotFoundError(
            f"the teacher can only load {where}, and sees no directory {name}",
            fix=f"Share it with the machine of the teacher, or start a teacher with --model {name}.",
        )
    directory = directory.resolve()
    if not any(directory.is_relative_to(root.resolve()) for root in roots):
        raise InvalidInputError(
            f"the teacher may not load {name}: it lies outside {', '.join(str(root.resolve()) for root in roots)}",
            fix="Put it there, or start the teacher with --allow-models-below DIR.",
        )
    if is_adapter(directory):
        _require_same_base(read_adapter(directory), start=start, adapter=directory, settings=settings)
        return weights_at(name, directory=start.directory, adapter=directory)
    check_model_directory(directory, revision=None)
    _require_decoder(directory, name=name)
    _require_same_shape(directory, start.directory)
    return weights_at(name, directory=directory)


def _require_decoder(directory: Path, *, name: str) -> None:
    """UnsupportedError for an encoder-decoder; of some transformers would load half, as a decoder."""
    if _read_json(directory / "config.json").get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{name} is an encoder-decoder, and only decoders such as Llama, Qwen or Gemma can teach",
            fix="Serve one of these. Encoder-decoders such as T5 can be students.",
        )


def weights_at(name: str, *, directory: Path, adapter: Path | None = None, revision: str = "") -> Weights:
    """Weights with the stamp of their files as they are now."""
    folders = [directory] if adapter is None else [directory, adapter]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file())
    stamp = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return Weights(name=name, directory=directory, adapter=adapter, revision=revision, stamp=stamp)


def is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()


def read_adapter(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter that is whole; ModelNotFoundError or UnsupportedError otherwise."""
    config = _read_json(directory / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{directory} holds an adapter of type {config.get('peft_type')}",
            fix="Only LoRA adapters can be served; merge this one into its base model.",
        )
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise ModelNotFoundError(
            f"{directory} is not an adapter: it lacks {ADAPTER_WEIGHTS}",
            fix="Name a directory that save_pretrained wrote for a PEFT model.",
        )
    return config


def _require_same_base(config: Mapping[str, Any], *, start: Weights, adapter: Path, settings: Settings) -> None:
    base = str(config.get("base_model_name_or_path") or "")
    if base == start.name or (base and _resolves_to(base, start.directory, settings)):
        return
    raise HandshakeError(
        f"{adapter} is an adapter of {base or 'no model that it names'}, and this teacher's base is {start.directory}",
        fix=f"Load an adapter of that model, or correct base_model_name_or_path in its {ADAPTER_CONFIG}.",
    )


def _require_same_shape(directory: Path, expected: Path) -> None:
    found, wanted = _read_json(directory / "config.json"), _read_json(expected / "config.json")
    differences = [
        f"{field} is {found.get(field)} instead of {wanted.get(field)}"
        for field in _SHAPE
        if field in found and field in wanted and found[field] != wanted[field]
    ]
    if not differences:
        differences = _tensor_differences(_tensor_shapes(directory), _tensor_shapes(expected), config=wanted)
    if differences:
        raise HandshakeError(
            f"{directory} is no checkpoint of the model that this teacher was started with: {'; '.join(differences)}",
            fix=f"Start a teacher of its own with --model {directory}.",
        )


def _tensor_differences(
    found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], *, config: Mapping[str, Any]
) -> list[str]:
    if not found or not wanted:
        # Older files without headers; loading them says what is wrong.
        return []
    # A head tied to the embedding is in some files and not in others.
    names = [name for name in sorted(found.keys() | wanted.keys()) if not _is_tied_head(name, config)]
    different = [name for name in names if found.get(name) != wanted.get(name)]
    return [
        f"{name} has the shape {_shape(found.get(name))} instead of {_shape(wanted.get(name))}"
        for name in different[:3]
    ]


def _is_tied_head(name: str, config: Mapping[str, Any]) -> bool:
    return name.endswith("lm_head.weight") and config.get("tie_word_embeddings", True) is not False


def _tensor_shapes(directory: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor, from the headers of the safetensors files; empty without any."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes.update({name: tensors.get_slice(name).get_shape() for name in tensors.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelNotFoundError(
                f"{file} cannot be read: {error}", fix="The file is cut short or damaged; write it again."
            ) from None
    return shapes


def _shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _resolves_to(name: str, directory: Path, settings: Settings) -> bool:
    if Path(name).expanduser().is_dir():
        return same_directory(name, directory)
    if is_path(name):
        return False
    try:
        # A hub id that is already on this machine; a question about an adapter downloads nothing.
        offline = settings.model_copy(update={"offline": True})
        return same_directory(resolve_model(name, settings=offline), directory)
    except ModelNotFoundError:
        return False


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{file} cannot be read: {error}", fix="Write the model's files again.") from None
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"{file} is no object", fix="Write the model's files again.")
    return content
