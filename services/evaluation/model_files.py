"""Which weights these are: a digest of a model directory's content, by which results are kept between evaluations."""

import hashlib
from pathlib import Path

PATTERNS = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "vocab.*")


def model_digest(directory: Path) -> str:
    """32 hex digits of the SHA-256 over weights, configuration and tokenizer; equal for equal files anywhere."""
    files = sorted({file for pattern in PATTERNS for file in directory.glob(pattern)})
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:32]
